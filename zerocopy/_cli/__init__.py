"""How is zerocopy used from a terminal?"""
