"""Has something that was published or loaded changed since?"""
