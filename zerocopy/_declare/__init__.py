"""Records the declarations of the user: pipeline classes and their fields."""
