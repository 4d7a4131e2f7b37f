"""One trained network on the engines that people deploy: what each answers, how fast, in how much memory."""
