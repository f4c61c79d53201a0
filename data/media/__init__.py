"""Foreign media, read in processes that can be killed: containers, clocks, pictures, faces, and one clip of them."""
