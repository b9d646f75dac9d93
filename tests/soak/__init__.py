"""A soak: many clients of every kind, for a while, and what the server looks like behind it."""
