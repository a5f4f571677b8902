"""The discrete-time optimal control problem: dynamics, costs, exactly solved systems, and how work is counted."""
