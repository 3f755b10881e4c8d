"""What did the user declare?"""
