"""How do bytes get into Ray's object store, and how are they found and mapped there again?"""
