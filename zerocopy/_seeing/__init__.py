"""Reports what processes publish and load, and how much memory it takes."""
