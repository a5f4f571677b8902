"""What each delta reaches, with how many parameters, at which cost."""
