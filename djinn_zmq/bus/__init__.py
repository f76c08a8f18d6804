"""How messages move: ROUTER and DEALER, the engine's link, the lease socket, keys."""
