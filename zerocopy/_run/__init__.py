"""What does Ray run: actors, tasks, and what happens to a call in a worker?"""
