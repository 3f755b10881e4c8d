"""Which nodes have the weights, and how are they brought to more of them, and kept there?"""
