"""What a user may set about the reference panel."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sae.config import Config, Seed

OUTCOME_MONTHS = 12


class ReferenceConfig(Config):
    """Size, world and rates of the reference panel; by default 6% of the entities default."""

    entities: int = Field(20_000, ge=1)
    """Entities in the panel; 20,000 over 24 months are about 360,000 rows."""
    months: int = Field(24, ge=6, le=600)
    """Calendar months shown; t runs from 0 (a January) to months - 1."""
    seed: Seed = 0
    """Seed of every draw, below 2^32; entity k has the same values whatever the number of entities."""
    world: Literal[0, 1, 2, 3] = 0
    """The protected attribute does 0 nothing, 1 lowers income, 2 inflates inquiries, 3 raises the hazard."""
    book: Literal["performing", "all"] = "performing"
    """`performing` shows accounts not in default at their last month, so that the true PD of that row is
    exact; `all` also shows those that default earlier, up to the last month before it that is not lost, so
    that the outcome per row has no survivor bias."""
    true_pd: Literal["last", "all"] = "last"
    """Rows that get a true PD: the last of each entity, or every row (about ten times the time)."""
    attrition: float = Field(0.01, ge=0, lt=1)
    """Probability per month that an account leaves the book, whatever its risk."""
    missing: float = Field(0.02, ge=0, lt=0.3)
    """Share of months missing at random; the last month of an entity is always there."""
    missing_delinquent_factor: float = Field(3.0, ge=0, le=3.3)
    """How many times more often a month is missing while the account is 30 or more days past due."""
    inq_missing: float = Field(0.3, ge=0, le=1)
    """Share of entities whose inquiries are null before `inq_missing_until`: the feed starts late."""
    inq_missing_until: int = Field(12, ge=0)
    """First calendar month in which inquiries are known for every entity."""
    outage: bool = True
    """Leaves one calendar month out for the whole lender, at two thirds of the window."""
    duplicates: float = Field(0.0, ge=0, le=1)
    """Share of rows written twice; 0 because repeats make a panel invalid, though 0.001 is realistic."""
    recode_month: int | None = Field(None, ge=0)
    """Calendar month from which buckets 1, 2, 3 are written as 2, 3, 4, a drift; null for never."""
    recession_start: int | None = Field(None, ge=0)
    """First calendar month of the recession; null for a third of the window."""
    recession_months: int = Field(12, ge=0)
    """Length of the recession in months; 0 for none."""
    frailty_sd: float = Field(0.5, ge=0, le=2)
    """Standard deviation of the entity's hidden frailty theta, in log-odds."""
    shock_rate: float = Field(0.006, ge=0, le=1)
    """Probability per month that an income shock of 3 to 9 months begins."""
    worsening_shift: float = Field(-0.25, ge=-5, le=5)
    """Constant added to the log-odds of every worsening move; raise it for more defaults. At -0.45, without
    a recession, rolling keeps the published marginals; the default leaves more to train on."""
    hazard_intercept: float = Field(-8.0, ge=-20, le=0)
    """Intercept of the monthly default hazard in log-odds; the published -7 lets insolvencies out of the blue
    outweigh what a history shows (AUC about 0.71 from the columns instead of 0.77)."""
    protected_share: float = Field(0.3, gt=0, lt=1)
    """Share of entities with the protected attribute."""
    protected_effect: float = Field(0.5, ge=-3, le=3)
    """Log-odds that the protected attribute adds to the hazard, in world 3 only."""

    @model_validator(mode="after")
    def _inside_the_window(self) -> Self:
        for name in ("recode_month", "recession_start"):
            month = getattr(self, name)
            if month is not None and month >= self.months:
                raise ValueError(f"{name} is {month}, but the panel's last month is {self.months - 1}")
        return self

    @property
    def outage_month(self) -> int:
        """The calendar month that the lender lost, -1 for none."""
        return (2 * self.months) // 3 if self.outage else -1

    @property
    def recession(self) -> range:
        """The calendar months of the recession."""
        start = self.months // 3 if self.recession_start is None else self.recession_start
        return range(start, start + self.recession_months)
