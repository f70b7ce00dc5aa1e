"""Before a byte is loaded: what each phase of a request will hold on the device, and what streams.

`make_plan` is a pure function of numbers. Its answer fits the budget, or BudgetError says what
would. Times are estimates; they only choose between placements.
"""
