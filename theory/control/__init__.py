"""The discrete-time optimal control problem: dynamics, costs, systems, and how work is counted."""
