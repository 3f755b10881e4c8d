"""How does what is in the store become a live pipeline?"""
