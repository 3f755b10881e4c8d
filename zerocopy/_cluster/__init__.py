"""How are publications found by name, from any job of the cluster, and how do they change while they are used?"""
