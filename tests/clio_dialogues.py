"""Invented dialogues over twenty topics in English and Russian, for the tests and figures of mode clio.

The wordings of a topic stand in pairs, English and Russian, so that a scripted brain can tell in English what a
dialogue in either language is about.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TOPICS: dict[str, tuple[tuple[str, str], ...]] = {
    "Debugging program code": (
        ("fix a Python script that crashes with an error", "исправить скрипт на Python, который падает с ошибкой"),
        ("find the bug in a JavaScript function", "найти ошибку в функции на JavaScript"),
        ("understand a compiler error in C++ code", "понять ошибку компилятора в коде на C++"),
        ("find out why a unit test of the code fails", "выяснить, почему не проходит модульный тест"),
    ),
    "Cooking recipes": (
        ("cook a lentil soup", "сварить чечевичный суп"),
        ("bake bread without yeast", "испечь хлеб без дрожжей"),
        ("find a recipe for a vegetarian dinner", "найти рецепт вегетарианского ужина"),
        ("replace eggs in a cake recipe", "заменить яйца в рецепте торта"),
    ),
    "Travel planning": (
        ("plan a week of travel in Portugal", "спланировать неделю путешествия по Португалии"),
        ("choose a hotel near the old town for a trip", "выбрать отель для поездки рядом со старым городом"),
        ("put together a travel itinerary for Japan", "составить маршрут поездки по Японии"),
        ("decide what to pack for a hiking trip", "решить, что взять с собой в поход"),
    ),
    "Tax questions": (
        ("fill in a tax return for the self-employed", "заполнить налоговую декларацию для самозанятых"),
        ("work out which expenses are tax deductible", "разобраться, какие расходы уменьшают налог"),
        ("find out the deadline for paying income tax", "узнать срок уплаты подоходного налога"),
        ("claim back tax that was overpaid", "вернуть излишне уплаченный налог"),
    ),
    "Job applications": (
        ("write a cover letter for a job application", "написать сопроводительное письмо для отклика на вакансию"),
        ("improve a resume for a job as an accountant", "улучшить резюме на должность бухгалтера"),
        ("prepare for a job interview", "подготовиться к собеседованию"),
        ("answer a question about salary expectations from a recruiter", "ответить рекрутеру о желаемой зарплате"),
    ),
    "Learning a foreign language": (
        ("practise Spanish verb conjugation", "потренировать спряжение испанских глаголов"),
        ("learn the German cases", "выучить немецкие падежи"),
        ("memorise French vocabulary", "запомнить французские слова"),
        ("understand when English uses the present perfect", "понять, когда в английском нужен Present Perfect"),
    ),
    "Fitness and training": (
        ("make a workout plan for building muscle", "составить план тренировок для набора мышц"),
        ("train for a half marathon", "подготовиться к полумарафону"),
        ("learn the right form for squats", "научиться правильно приседать со штангой"),
        ("start exercising at home without equipment", "начать заниматься спортом дома без снарядов"),
    ),
    "Gardening": (
        ("grow tomatoes on a balcony", "вырастить помидоры на балконе"),
        ("get rid of aphids on roses in the garden", "избавиться от тли на розах в саду"),
        ("choose a time for planting bulbs in the garden", "выбрать время посадки луковиц в саду"),
        ("prune an old apple tree", "обрезать старую яблоню"),
    ),
    "Rent and landlords": (
        ("write to a landlord about a broken heater", "написать арендодателю о сломанном отоплении"),
        ("get the rental deposit back after moving out", "вернуть залог за квартиру после выезда"),
        ("understand a clause of a lease for a flat", "понять пункт договора аренды квартиры"),
        ("object to a rent increase", "возразить против повышения арендной платы"),
    ),
    "Mathematics homework": (
        ("solve a quadratic equation for homework", "решить квадратное уравнение из домашнего задания"),
        ("prove a theorem about prime numbers", "доказать теорему о простых числах"),
        ("compute the derivative of a function", "найти производную функции"),
        ("understand the integral in a calculus exercise", "понять интеграл в упражнении по анализу"),
    ),
    "Health symptoms": (
        ("find out what may cause a lasting cough", "узнать, отчего бывает затяжной кашель"),
        ("know whether a headache needs a doctor", "понять, нужен ли врач при головной боли"),
        ("understand the side effects of a medicine", "разобраться в побочных действиях лекарства"),
        ("treat a skin rash", "лечить сыпь на коже"),
    ),
    "Poems and stories": (
        ("write a short poem about autumn", "написать короткое стихотворение об осени"),
        ("invent a plot for a fantasy story", "придумать сюжет фантастического рассказа"),
        ("describe the hero of a novel", "описать героя романа"),
        ("find rhymes for the verses of a song", "подобрать рифмы к куплетам песни"),
    ),
    "Car repair": (
        ("find out why a car engine does not start", "выяснить, почему не заводится двигатель машины"),
        ("change the brake pads of a car", "заменить тормозные колодки на машине"),
        ("understand a warning light on the dashboard of a car", "понять, что значит лампочка на панели машины"),
        ("choose winter tires for a car", "выбрать зимние шины для машины"),
    ),
    "Investing money": (
        ("choose an index fund for investing savings", "выбрать индексный фонд для вложения сбережений"),
        ("understand how government bonds work", "понять, как работают государственные облигации"),
        ("build a portfolio of stocks for retirement", "собрать портфель акций к пенсии"),
        ("compare a savings deposit with shares", "сравнить вклад и акции"),
    ),
    "Raising children": (
        ("get a toddler to sleep through the night", "приучить малыша спать всю ночь"),
        ("talk to a teenager about screen time", "поговорить с подростком о времени за экраном"),
        ("handle the tantrums of a three-year-old child", "справиться с истериками трёхлетнего ребёнка"),
        ("prepare a child for kindergarten", "подготовить ребёнка к детскому саду"),
    ),
    "Caring for pets": (
        ("teach a puppy not to bite", "отучить щенка кусаться"),
        ("choose food for an old cat", "выбрать корм для старой кошки"),
        ("clean the aquarium of goldfish", "почистить аквариум с золотыми рыбками"),
        ("calm a dog that is afraid of fireworks", "успокоить собаку, которая боится салюта"),
    ),
    "Databases and SQL": (
        ("write an SQL query that joins two tables", "написать запрос SQL, соединяющий две таблицы"),
        ("speed up a slow database query with an index", "ускорить медленный запрос к базе данных индексом"),
        ("design the tables of a database for orders", "спроектировать таблицы базы данных для заказов"),
        ("move a database from MySQL to PostgreSQL", "перенести базу данных с MySQL на PostgreSQL"),
    ),
    "History questions": (
        ("understand the causes of the fall of the Roman Empire", "понять причины падения Римской империи"),
        ("write an essay about the history of the French Revolution", "написать сочинение о Французской революции"),
        ("learn about daily life in the Middle Ages", "узнать о жизни людей в Средние века"),
        ("compare the rulers of ancient Egypt", "сравнить правителей Древнего Египта"),
    ),
    "Marketing texts": (
        ("write an advertising text for a coffee shop", "написать рекламный текст для кофейни"),
        ("come up with a slogan for a new brand", "придумать слоган для нового бренда"),
        ("plan social media posts for marketing a product", "спланировать посты для продвижения товара"),
        ("write a newsletter that advertises a sale", "написать рассылку с рекламой распродажи"),
    ),
    "Weddings and parties": (
        ("plan the seating at a wedding", "спланировать рассадку гостей на свадьбе"),
        ("write a toast for the wedding of a friend", "написать тост на свадьбу друга"),
        ("organise a surprise birthday party", "устроить вечеринку-сюрприз на день рождения"),
        ("choose games for a party", "выбрать игры для вечеринки"),
    ),
}  # fmt: skip

DETAILS = (
    ("before the end of the week", "до конца недели"),
    ("for a beginner", "для начинающего"),
    ("as cheaply as possible", "как можно дешевле"),
    ("without help from others", "без чужой помощи"),
    ("step by step", "шаг за шагом"),
    ("for the second time", "уже во второй раз"),
    ("in simple words", "простыми словами"),
    ("in a short time", "за короткое время"),
)
OPENINGS = {
    "English": ("Hi!", "Hello there.", "Good evening,", "I have a question.", "Quick one:", "So,"),
    "Russian": ("Привет!", "Здравствуйте.", "Добрый вечер,", "У меня вопрос.", "Коротко:", "Итак,"),
}
WISHES = {
    "English": ("Please help me to {}", "I want to {}", "How do I {}", "I need to {}", "Could you help to {}"),
    "Russian": ("Помогите {}", "Хочу {}", "Как мне {}", "Мне нужно {}", "Помогите, пожалуйста, {}"),
}
REPLIES = {
    "English": ("Of course. What have you tried so far?", "Gladly. Tell me a little more.", "Let us begin."),
    "Russian": ("Конечно. Что вы уже пробовали?", "С радостью. Расскажите подробнее.", "Давайте начнём."),
}
FOLLOWING = {
    "English": ("Nothing yet.", "I tried once and gave up.", "My sister told me to ask.", "It is rather urgent."),
    "Russian": ("Пока ничего.", "Пробовал один раз и бросил.", "Сестра посоветовала спросить.", "Это довольно срочно."),
}
LANGUAGES = ("English", "Russian")


def generate(n_rows: int = 2000, *, seed: int = 0, n_topics: int = len(TOPICS)) -> list[dict[str, Any]]:
    """Dialogues with conversation_id, user_id, language, topic and messages; topics and languages take turns."""
    dice = random.Random(seed)
    names = list(TOPICS)[:n_topics]
    rows = []
    for number in range(n_rows):
        topic, language = names[number % n_topics], LANGUAGES[number // n_topics % 2]
        rows.append(
            {
                "conversation_id": f"c{number:05d}",
                "user_id": f"u{dice.randrange(max(1, n_rows // 2)):05d}",
                "language": language,
                "topic": topic,
                "messages": _messages(topic, language, dice),
            }
        )
    dice.shuffle(rows)
    return rows


def _messages(topic: str, language: str, dice: random.Random) -> list[dict[str, str]]:
    side = LANGUAGES.index(language)
    wish = dice.choice(WISHES[language]).format(f"{dice.choice(TOPICS[topic])[side]} {dice.choice(DETAILS)[side]}")
    said = [
        ("user", f"{dice.choice(OPENINGS[language])} {wish}."),
        ("assistant", dice.choice(REPLIES[language])),
        ("user", f"{dice.choice(FOLLOWING[language])} [{dice.randrange(10_000)}]"),
    ]
    return [{"role": role, "content": content} for role, content in said]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
