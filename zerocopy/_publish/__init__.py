"""How does a live pipeline get into the store?"""
