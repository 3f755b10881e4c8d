"""What do Python, torch, Ray and Linux do that they do not promise?"""
