"""Where the networks live and how samples move between them.

Shape suffixes are those of coe_dist.coe: N global batch, B rows of this rank, E experts, k experts per sample; here
also W ranks (the world size) and P (sample, expert) pairs that one rank computes.
"""
