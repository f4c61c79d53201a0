"""What is in shards and what is wrong with them; run as `affekt inspect`."""
