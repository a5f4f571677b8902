"""What a sweep will do and when it is done: how long runs take, the plan, the time that is left."""
