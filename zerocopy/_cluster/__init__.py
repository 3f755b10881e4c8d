"""Finds publications by name, from any job of the cluster, and changes them while they are used."""
