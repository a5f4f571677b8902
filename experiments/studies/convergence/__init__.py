"""How many updates, and how many seconds, each delta needs to be nearly done."""
