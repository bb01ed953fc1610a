"""Kernels in Triton's language, in files of the names of those that start them. Only bodies import these, when called.

In the interpreter a bf16 number is a bit pattern that arithmetic gets wrong and conversion cuts off. So:
`.to(tl.float32)` right after each load, `rounded` at each store, and no `tl.dot`. A call of a function that is
decorated takes it a millisecond or two, so there are few.
"""
