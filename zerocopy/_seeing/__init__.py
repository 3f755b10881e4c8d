"""What do processes tell of what they publish and load, and what does it take?"""
