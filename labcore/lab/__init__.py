"""What drives everything: stages and when they are stale, the execution of notebooks, the command line."""
