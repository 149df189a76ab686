"""Where arrays live: the mesh (make.py), rules of placement, arrays on it, the compiler, chips."""
