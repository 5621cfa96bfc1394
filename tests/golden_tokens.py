"""Golden files of E2VPT, VFPT and VAPT; see `golden_cases`."""

FAMILIES = {}
