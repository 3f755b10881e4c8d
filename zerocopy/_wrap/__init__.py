"""How are objects shared whose classes one did not write?"""
