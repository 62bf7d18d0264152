"""Sums and differences with their digit-by-digit working written out."""

import random
from dataclasses import dataclass

from compress.builtin.world import split_of


@dataclass(frozen=True)
class Sum:
    """`left + right`, or `left - right` with a result of zero or more."""

    left: int
    right: int
    sign: str

    @property
    def split(self) -> str:
        """The only split in whose text these operands occur together; 12+34 and 34+12 are the same."""
        pair = sorted((self.left, self.right)) if self.sign == "+" else (self.left, self.right)
        return split_of(f"arithmetic/{pair[0]}{self.sign}{pair[1]}")

    @property
    def result(self) -> int:
        """The right result."""
        return self.left + self.right if self.sign == "+" else self.left - self.right

    def ask(self) -> str:
        """Return the question, such as "47+85=?"."""
        return f"{self.left}{self.sign}{self.right}=?"

    def answer(self) -> str:
        """Return the working and the result.

        47+85 gives "7+5=12, carry 1. 4+8+1=13, carry 1. So 132."
        """
        steps = []
        carry = 0
        for position in range(max(len(str(self.left)), len(str(self.right)))):
            a, b = (number // 10**position % 10 for number in (self.left, self.right))
            if self.sign == "+":
                total = a + b + carry
                working = f"{a}+{b}" + ("+1" if carry else "") + f"={total}"
                carry, word = total // 10, "carry"
            else:
                borrow = int(a - carry < b)
                digit = a - carry + 10 * borrow - b
                working = f"{'1' if borrow else ''}{a}-{b}" + ("-1" if carry else "") + f"={digit}"
                carry, word = borrow, "borrow"
            steps.append(f"{working}" + (f", {word} 1." if carry else "."))
        return f"{' '.join(steps)} So {self.result}."


def draw(rng: random.Random, split: str) -> Sum:
    """Return a problem of the split: one to three digits."""
    while True:
        low, high = rng.choice(((10, 99), (10, 99), (100, 999), (100, 999), (1, 99)))
        left, right = rng.randint(low, high), rng.randint(low, high)
        sign = rng.choice("+-")
        if sign == "-" and left < right:
            left, right = right, left
        problem = Sum(left, right, sign)
        if problem.split == split:
            return problem
