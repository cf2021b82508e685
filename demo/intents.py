"""The thirty intents of the demonstration, how often each occurs, and which are easily taken for one another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    """What a customer wants; `topic` chooses the context sentences, `weight` the relative frequency."""

    name: str
    topic: str  # card, money, telecom, shop or account
    weight: float


INTENTS = (
    Intent("card_lost", "card", 1.3),
    Intent("card_stolen", "card", 1.1),
    Intent("card_payment_declined", "card", 1.6),
    Intent("pin_forgotten", "card", 0.9),
    Intent("cash_withdrawal_problem", "card", 0.8),
    Intent("charge_dispute", "card", 1.7),
    Intent("duplicate_charge", "card", 1.2),
    Intent("balance_question", "money", 1.0),
    Intent("transfer_not_received", "money", 1.5),
    Intent("transfer_cancel", "money", 0.8),
    Intent("loan_early_repayment", "money", 0.6),
    Intent("no_connection", "telecom", 1.7),
    Intent("internet_slow", "telecom", 1.6),
    Intent("roaming_question", "telecom", 0.7),
    Intent("plan_change", "telecom", 1.1),
    Intent("sim_replacement", "telecom", 0.7),
    Intent("number_porting", "telecom", 0.5),
    Intent("bill_too_high", "telecom", 1.3),
    Intent("contract_cancellation", "telecom", 0.9),
    Intent("refund_status", "shop", 1.9),
    Intent("return_request", "shop", 1.4),
    Intent("order_status", "shop", 2.2),
    Intent("delivery_late", "shop", 1.8),
    Intent("order_cancel", "shop", 1.1),
    Intent("item_damaged", "shop", 1.0),
    Intent("wrong_item", "shop", 0.9),
    Intent("promo_code_problem", "shop", 0.8),
    Intent("address_change", "shop", 0.7),
    Intent("password_reset", "account", 1.3),
    Intent("account_blocked", "account", 1.0),
)

CONFUSABLE_PAIRS = (
    ("card_lost", "card_stolen"),
    ("refund_status", "charge_dispute"),
    ("charge_dispute", "duplicate_charge"),
    ("card_payment_declined", "cash_withdrawal_problem"),
    ("card_payment_declined", "account_blocked"),
    ("pin_forgotten", "password_reset"),
    ("password_reset", "account_blocked"),
    ("transfer_not_received", "transfer_cancel"),
    ("transfer_not_received", "balance_question"),
    ("loan_early_repayment", "balance_question"),
    ("no_connection", "internet_slow"),
    ("no_connection", "sim_replacement"),
    ("roaming_question", "bill_too_high"),
    ("bill_too_high", "plan_change"),
    ("plan_change", "contract_cancellation"),
    ("contract_cancellation", "number_porting"),
    ("sim_replacement", "number_porting"),
    ("return_request", "refund_status"),
    ("order_status", "delivery_late"),
    ("order_cancel", "return_request"),
    ("item_damaged", "wrong_item"),
    ("item_damaged", "return_request"),
    ("promo_code_problem", "order_cancel"),
    ("address_change", "order_status"),
)


def neighbours_of(name: str) -> tuple[str, ...]:
    """Return the intents that are easily taken for this one."""
    pairs = (pair for pair in CONFUSABLE_PAIRS if name in pair)
    return tuple(second if first == name else first for first, second in pairs)
