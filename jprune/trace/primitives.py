"""What primitives mean for a parameter that they read together with a value that depends on an argument."""

import re

from jprune.trace.jaxpr import CASTS, ELEMENTWISE, IDENTITIES, LAYOUTS

VIEWING = IDENTITIES | LAYOUTS
"""Their results have the elements of the first operand."""
HARMLESS = ELEMENTWISE | LAYOUTS
"""What reads a parameter in these is no product: biases, scales, positions."""
ROWS = re.compile(
    "^(gather|dynamic_slice|dynamic_update_slice|slice|split|concatenate|pad|rev|sort|top_k|iota"
    "|(scatter|reduce|arg|cum|random|select_and).*)$"
)
"""Nor is there one in these: rows are looked up, put in other places, added up."""
SUMS = {"add", "add_any", "sub"}
CARRYING = {
    *(CASTS | VIEWING | SUMS),
    *("mul", "div", "neg", "select_n", "gather", "dynamic_slice", "slice", "split", "concatenate"),
}
"""Through these a kernel that depends on an argument is still that kernel."""
LOOPS = {"scan", "while", "cond"}
