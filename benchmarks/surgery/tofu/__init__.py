"""Kind D of the surgery benchmark: made-up authors (TOFU), some of whom must be forgotten while the others stay."""
