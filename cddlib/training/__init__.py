"""One step of SGD and its derivatives: all the arithmetic that takes time."""
