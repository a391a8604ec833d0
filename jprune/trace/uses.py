"""Every use of every parameter, followed to its end.

The walk goes through the equations from top to bottom, and into the bodies of scans, loops and branches. Of each value
it knows whether it is made of parameters alone, and if it is a view of a leaf, which. Where such a value meets one that
depends on an argument, a use of the parameter ends: in a product with a kernel, in a product that is no such, with the
reason, or in something else, as adding a bias or looking up a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from jprune.trace import kernels, products
from jprune.trace.jaxpr import (
    CASTS,
    ELEMENTWISE,
    MATMULS,
    Atom,
    Body,
    Equation,
    Trace,
    Var,
    flat_body,
    scan_counts,
    variables,
    where_written,
)
from jprune.trace.kernels import View
from jprune.trace.levels import NONE, End, Level, Paths, constant
from jprune.trace.primitives import CARRYING, HARMLESS, LOOPS, ROWS, SUMS, VIEWING
from jprune.trace.products import Product
from jprune.trace.views import COPIES, follow


def walk(flat: Trace) -> tuple[Level, list[End]]:
    """What is known of the values of a trace, and where every use of its parameters ends."""
    found = _Walk(flat, bare=False)
    outputs = [found.top.origins.get(x) for x in flat.outputs if isinstance(x, jex.Var)]
    if None not in outputs and any(outputs):
        # Nothing depends on an argument: what f closes over takes their place.
        found = _Walk(flat, bare=True)
    return found.top, found.ends


class _Walk:
    def __init__(self, flat: Trace, *, bare: bool) -> None:
        self.bare = bare
        self.ends: list[End] = []
        self.shapes = {path: x.aval.shape for path, x in flat.params.items()}
        body = Body(
            equations=flat.equations,
            inputs=(*flat.params.values(), *flat.args),
            outputs=flat.outputs,
            constants=flat.constants,
        )
        self.top = Level(body=body)
        self.top.origins |= {} if bare else dict.fromkeys(flat.constants, NONE)
        for path, x in flat.params.items():
            self.top.origins[x] = frozenset([path])
            self.top.views[x] = kernels.of_leaf(path, x.aval.shape)
        self.run(self.top)
        for x in flat.outputs:
            # Handing a parameter through is no use of it; picking rows is.
            if isinstance(x, jex.Var) and (x not in self.top.views or self.top.views[x].picked is not None):
                self.end(self.top, None, x, "it is returned")

    def run(self, level: Level) -> None:
        for equation in level.body.equations:
            self.step(level, equation)
            for x in equation.outvars:
                level.makers[x] = equation

    def step(self, level: Level, equation: Equation) -> None:
        operands = variables(equation)
        known = [level.origins[x] for x in operands if x in level.origins]
        fixed = len(known) == len(operands) and not equation.effects
        made_of = NONE.union(*known)
        if self.bare:
            fixed = fixed and bool(made_of)
        name = equation.primitive.name
        if fixed:
            level.origins.update(dict.fromkeys(equation.outvars, made_of))
            if made_of and (name in MATMULS or not level.multiplied.isdisjoint(operands)):
                level.multiplied.update(equation.outvars)
        elif name in LOOPS:
            self.enter(level, equation)
            return
        elif name in MATMULS:
            self.multiply(level, equation)
        elif made_of or name == "reduce_sum" or any(x in level.views or x in level.derived for x in operands):
            self.read(level, equation)
        self.look(level, equation, operands, fixed)

    def look(self, level: Level, equation: Equation, operands: Sequence[Var], fixed: bool) -> None:
        """Notes what the results are views of."""
        name = equation.primitive.name
        first = equation.invars[0] if equation.invars else None
        seen: list[View | str] = []
        view = level.views.get(first) if isinstance(first, jex.Var) and name not in MATMULS else None
        if view is not None and (fixed or name in ("gather", "dynamic_slice") or view.picked):
            seen = kernels.views(equation, view, lambda x: constant(level, x))
        for i, result in enumerate(equation.outvars if fixed or seen else ()):
            as_view = seen[min(i, len(seen) - 1)] if seen else f"made by {name}"
            if isinstance(as_view, View):
                level.views[result] = as_view
            elif fixed and level.origins[result]:
                inherited = level.reasons.get(first) if name in CASTS | VIEWING else None
                level.reasons[result] = inherited or (as_view, equation)
        if operands and name in VIEWING and equation.outvars[0] not in level.views:
            root, axes = level.root(operands[0])
            if (known := follow(equation, axes)) is not None:
                level.roots[equation.outvars[0]] = root, known

    def enter(self, level: Level, equation: Equation) -> None:
        """Walks through the bodies of a loop or branch."""
        params, operands = equation.params, equation.invars
        match equation.primitive.name:
            case "scan":
                consts, carried = scan_counts(equation)
                kinds = ["same"] * consts + ["carry"] * carried + ["slice"] * (len(operands) - consts - carried)
                inner = [self.inside(level, equation, params["jaxpr"], operands, kinds)]
            case "while":
                cond, body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
                carry = ["carry"] * (len(operands) - body)
                inner = [
                    self.inside(
                        level,
                        equation,
                        params["cond_jaxpr"],
                        operands[:cond] + operands[body:],
                        ["same"] * cond + carry,
                        counted=False,
                    ),
                    self.inside(
                        level, equation, params["body_jaxpr"], operands[cond:], ["same"] * (body - cond) + carry
                    ),
                ]
            case _:
                if isinstance(operands[0], jex.Var):
                    self.end(level, equation, operands[0], "it chooses a branch")
                kinds = ["same"] * (len(operands) - 1)
                inner = [self.inside(level, equation, b, operands[1:], kinds) for b in params["branches"]]
        if equation.outvars:
            level.inner[equation.outvars[0]] = tuple(inner)
        results = inner[-1:] if equation.primitive.name == "while" else inner
        for i, result in enumerate(equation.outvars):
            paths = NONE
            for body in results:
                x = body.body.outputs[i]
                if isinstance(x, jex.Var):
                    if x not in body.views or body.views[x].picked is not None:
                        self.end(body, None, x, f"it is returned by the body of a {equation.primitive.name}", equation)
                    paths |= self.paths(body, x) | body.derived.get(x, (NONE, None))[0]
            if paths:
                level.derived[result] = paths, equation

    def inside(
        self,
        level: Level,
        equation: Equation,
        closed: Any,
        operands: Sequence[Atom],
        kinds: Sequence[str],
        *,
        counted: bool = True,
    ) -> Level:
        body = flat_body(closed)
        inner = Level(body=body, depth=level.depth + 1, counted=level.counted and counted)
        inner.origins |= {} if self.bare else dict.fromkeys(body.constants, NONE)
        for x, operand, kind in zip(body.inputs, operands, kinds, strict=True):
            if isinstance(operand, jex.Literal):
                if kind != "carry":
                    inner.origins[x] = NONE
                continue
            if operand in level.derived:
                inner.derived[x] = level.derived[operand]
            view, made_of = level.views.get(operand), level.origins.get(operand)
            if made_of is None and view is None:
                continue
            if kind == "carry" or made_of is None:
                paths = self.paths(level, operand)
                if paths:
                    self.end(level, equation, operand, f"it is carried through a {equation.primitive.name}")
                    inner.derived[x] = paths, equation
                continue
            inner.origins[x] = made_of
            if operand in level.multiplied:
                inner.multiplied.add(x)
            inner.reasons[x] = level.reasons.get(operand, (f"cut by a {equation.primitive.name}", equation))
            if view is None:
                continue
            if kind == "same":
                inner.views[x] = view
            elif all(d.axis >= 0 for d in view.axes[0]) and view.picked is None:
                along = (*view.scanned, (level.depth, view.axes[0]))
                inner.views[x] = dataclasses.replace(view, axes=view.axes[1:], scanned=along)
        self.run(inner)
        return inner

    def multiply(self, level: Level, equation: Equation) -> None:
        """A product: with a kernel, if one of its operands is a view of a leaf."""
        pair = [x for x in equation.invars[:2] if isinstance(x, jex.Var)]
        sides = [i for i, x in enumerate(equation.invars[:2]) if isinstance(x, jex.Var) and level.origins.get(x)]
        if not sides:
            picked = [i for i, x in enumerate(equation.invars[:2]) if isinstance(x, jex.Var) and x in level.views]
            sides = picked if len(picked) == 1 else []
        for x in equation.invars[2:]:
            if isinstance(x, jex.Var):
                self.end(level, equation, x, equation.primitive.name)
        if not sides:
            for x in pair:
                if x in level.derived and self.is_kernel(level.derived[x][0]):
                    paths, maker = level.derived[x]
                    self.skip(equation, paths, f"its kernel depends on an argument: {_words(maker)}")
                self.end(level, equation, x, equation.primitive.name)
            return
        side = sides[0]
        kernel = equation.invars[side]
        for x in pair:
            if x is not kernel:
                self.end(level, equation, x, equation.primitive.name)
        paths = self.paths(level, kernel)
        view = level.views.get(kernel)
        if view is None:
            reason, maker = level.reasons[kernel]
            self.skip(equation, paths, f"its kernel is no view of a parameter, but {reason} at {where_written(maker)}")
            return
        product = products.product(equation, side, view, level.root)
        if product == products.LOOKED_UP:
            self.end(level, equation, kernel, equation.primitive.name)
            return
        if not isinstance(product, str) and not level.counted:
            product = "it lies in the condition of a loop"
        if isinstance(product, str):
            self.skip(equation, paths, product)
            return
        product = _whole(product, self.shapes[product.place.path])
        level.products[equation.outvars[0]] = product
        self.ends.append(
            End(
                paths=(product.place.path,),
                skipped=False,
                what=equation.primitive.name,
                source=where_written(equation),
                product=product,
            )
        )

    def read(self, level: Level, equation: Equation) -> None:
        """Any other equation whose results depend on an argument."""
        name = equation.primitive.name
        derived: Paths = NONE
        for i, x in enumerate(equation.invars):
            if not isinstance(x, jex.Var):
                continue
            if i == 0 and self.still_a_view(level, equation):
                continue
            if made_of := self.paths(level, x):
                kernel = self.is_kernel(made_of)
                if name not in HARMLESS and not ROWS.match(name):
                    self.skip(equation, made_of, f"{name} reads it, which is not followed")
                else:
                    self.end(level, equation, x, name)
                picked = x in level.views and level.views[x].picked is not None
                if kernel and not self.copied(level, equation, x) and not (picked and name in SUMS):
                    derived |= made_of
                    level.derived.update({y: (derived, equation) for y in equation.outvars})
                    if picked or name == "gather":
                        level.looked_up.update(equation.outvars)
            elif x in level.derived and name in CARRYING and not (x in level.looked_up and name in SUMS):
                for y in equation.outvars:
                    level.derived.setdefault(y, level.derived[x])
                    if x in level.looked_up:
                        level.looked_up.add(y)
            elif name == "reduce_sum":
                self.summed(level, equation, x)

    def still_a_view(self, level: Level, equation: Equation) -> bool:
        x = equation.invars[0]
        if not isinstance(x, jex.Var) or x not in level.views:
            return False
        name = equation.primitive.name
        if x in level.origins and name not in ("gather", "dynamic_slice"):
            return False
        if level.views[x].picked is not None and name in ("gather", "dynamic_slice"):
            return False
        seen = kernels.views(equation, level.views[x], lambda y: constant(level, y))
        return all(isinstance(view, View) for view in seen)

    def copied(self, level: Level, equation: Equation, x: Var) -> bool:
        """Whether an equation reads the elements of a leaf more than once, as of a bias, which every token has."""
        if equation.primitive.name in ELEMENTWISE and x.aval.shape != equation.outvars[0].aval.shape:
            return True
        return x in level.views and any(d.axis == COPIES for digits in level.views[x].axes for d in digits)

    def summed(self, level: Level, equation: Equation, x: Var) -> None:
        """A sum of products with a kernel, element by element, is a matmul that is written out."""
        maker = level.makers.get(x)
        while maker is not None and maker.primitive.name in CASTS | VIEWING:
            maker = level.makers.get(maker.invars[0]) if isinstance(maker.invars[0], jex.Var) else None
        if maker is None or maker.primitive.name != "mul":
            return
        for factor in variables(maker):
            if (paths := self.paths(level, factor)) and self.is_kernel(paths):
                self.skip(equation, paths, f"it is multiplied element by element and summed: {_words(maker)}")

    def is_kernel(self, paths: Paths) -> bool:
        """Whether one of these leaves could be a kernel: it has two axes at least."""
        return any(sum(n > 1 for n in self.shapes[path]) >= 2 for path in paths)

    def paths(self, level: Level, x: Var) -> Paths:
        """The parameters that a value is made of, if it is made of them alone, or picked from one."""
        return level.origins.get(x) or (frozenset([level.views[x].path]) if x in level.views else NONE)

    def end(self, level: Level, equation: Equation | None, x: Var, what: str, at: Equation | None = None) -> None:
        """Notes that a use of what x is made of ends in something that is no product."""
        paths = self.paths(level, x)
        if not paths:
            return
        at = equation or at or level.makers.get(x)
        source = where_written(at) if at is not None else ""
        if x in level.multiplied and at is not None:
            self.skip(at, paths, "what it is multiplied with depends on no argument; hand that in as one")
            return
        if x in level.views and level.views[x].picked is not None:
            what = "gather"
        self.ends.append(End(paths=tuple(sorted(paths)), skipped=False, what=what, source=source))

    def skip(self, equation: Equation, paths: Paths, reason: str) -> None:
        """Notes a product that is not followed, of those parameters that could be kernels; others only go into it."""
        could = frozenset(p for p in paths if self.is_kernel(frozenset([p]))) or paths
        source = where_written(equation)
        self.ends.append(End(paths=tuple(sorted(could)), skipped=True, what=reason, source=source))
        if rest := tuple(sorted(paths - could)):
            self.ends.append(End(paths=rest, skipped=False, what="it goes into a kernel", source=source))


def _whole(product: Product, shape: tuple[int, ...]) -> Product:
    """The product with its place said in the shortest way."""
    if product.place.part == tuple((0, n) for n in shape):
        return dataclasses.replace(product, place=dataclasses.replace(product.place, part=None))
    return dataclasses.replace(product, plain=False)


def _words(equation: Equation) -> str:
    return f"{equation.primitive.name} at {where_written(equation)}"
