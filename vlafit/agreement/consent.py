"""How a difference between two sides is accepted: by a key of the recipe, or by an option of a command."""

from dataclasses import dataclass, replace

from vlafit.agreement.values import Item


@dataclass(frozen=True)
class Consent:
    """One way to accept a difference, and whether it was taken."""

    text: str
    """What a remedy tells the user to write."""
    option: str
    """The same as an option of the command line."""
    reason: str
    """What the agreement names as the reason."""
    given: bool

    @classmethod
    def of_recipe(cls, key: str, given: bool) -> "Consent":
        """Return the consent by a key of the recipe, such as `adapt.frames`, that is true or false."""
        section, _, name = key.partition(".")
        return cls(f"[{section}] {name} = true", f"--{key} true", key, given)

    @classmethod
    def of_option(cls, option: str, given: bool) -> "Consent":
        """Return the consent by an option of a command."""
        return cls(option, option, option, given)

    def to(self, item: Item, fix: str) -> Item:
        """Return an item on which the sides differ: chosen with the consent, else a conflict.

        `fix` is the remedy, with `{consent}` in the place of this one.
        """
        if self.given:
            return replace(item, status="chosen", reason=self.reason)
        remedy = fix.replace("{consent}", self.text)
        return replace(item, value="", status="conflict", fix=remedy, accept=(self.option,))
