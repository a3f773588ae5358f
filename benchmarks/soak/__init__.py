"""The soak: very many requests, some of whose clients leave, and the proof that the server keeps nothing of them."""
