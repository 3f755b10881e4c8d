"""How is an object split into its skeleton and its tensors?"""
