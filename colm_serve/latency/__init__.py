"""Models of how long work takes, fitted to the work as it is done."""
