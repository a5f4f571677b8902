"""A package, so that a test can import the problems and records that tests share."""
