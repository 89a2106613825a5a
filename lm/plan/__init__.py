"""What a step costs on hardware that is not here: the train step compiled ahead of time, and read."""
