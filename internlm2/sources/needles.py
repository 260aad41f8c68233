"""Needles in haystacks: sentences that tell a secret word, hidden in prose that is generated without end.

For measuring (`internlm2.evaluate.needle`) and, as source `kind: needles`, for teaching a small model to look back: the
same kind of text, never the same documents. A needle's secret is one of 32 words: few enough that a small model learns
to copy each within a few hundred steps, enough that a guess is right once in 32 times.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from internlm2.permutation import derive_key, mix
from internlm2.sources.documents import Document
from internlm2.text.chat import FORMAT as CHAT_FORMAT
from internlm2.text.chat import Message

# The documents of each part; short ones are what a model learns the task from, long ones what it learns distance from.
PARTS = ("english", "chinese")
# Raise when a change below alters the documents: cached shards of the old kind are then not used.
DERIVATION_VERSION = 1
DOCUMENTS = 24_000
# Sentences of prose in a document, about 12 tokens each: log-uniform between the two, rounded, so that many have none.
FEWEST_SENTENCES, MOST_SENTENCES = 0.25, 72
MOST_NEEDLES = 5


@dataclass(frozen=True)
class Needle:
    """`sentence` hides `answer`; a model that goes on after `prompt` should write it. `question` asks it of a chat
    model.
    """

    sentence: str
    prompt: str
    question: str
    answer: str


@dataclass(frozen=True)
class Language:
    """What sentences are made of. `frame` holds {0}..{4}, one for each list of `parts`."""

    frame: str
    parts: tuple[tuple[str, ...], ...]
    places: tuple[str, ...]
    secrets: tuple[str, ...]
    needle: str  # of {place}; the secret and `stop` follow
    question: str
    stop: str
    space: str

    def sentence(self, key: int) -> str:
        """One of several million sentences of prose; a function of the key."""
        chosen = []
        for words in self.parts:
            key = mix(key + 1)
            chosen.append(words[key % len(words)])
        text = self.frame.format(*chosen)
        return text[0].upper() + text[1:]

    def needle_of(self, key: int) -> Needle:
        """A place and its secret; a function of the key."""
        place, answer = self.places[mix(key) % len(self.places)], self.secrets[mix(key + 1) % len(self.secrets)]
        prompt = self.needle.format(place=place)
        return Needle(f"{prompt}{answer}{self.stop}", prompt, self.question.format(place=place), answer)


ENGLISH = Language(
    frame="{0} {1} {2} {3} {4}.",
    parts=(
        (
            "the old gardener", "a young teacher", "the harbour pilot", "my neighbour", "the night watchman",
            "a retired engineer", "the baker's daughter", "every student", "the travelling musician", "her uncle",
            "a quiet librarian", "the ferry captain", "two carpenters", "the village doctor", "an honest merchant",
            "the youngest cousin", "a group of hikers", "the postman", "his grandmother", "the museum guide",
        ),
        (
            "carried", "repaired", "described", "looked after", "borrowed", "painted", "wrapped", "counted", "sold",
            "found", "remembered", "cleaned", "measured", "forgot", "brought back", "admired", "moved", "sketched",
        ),
        (
            "a basket of apples", "the broken clock", "several letters", "a wooden chair", "the spare keys",
            "an unfinished map", "three umbrellas", "a heavy suitcase", "the morning newspaper", "some fresh bread",
            "a box of nails", "the blue bicycle", "a long rope", "the winter coats", "an old photograph",
            "a jar of honey", "the empty bottles", "a pair of boots", "the tall ladder", "many small stones",
        ),
        (
            "near the river", "behind the station", "in the kitchen", "at the market", "beside the chapel",
            "on the upper floor", "under the bridge", "along the coast", "outside the theatre", "in the courtyard",
            "next to the mill", "across the square", "at the end of the road", "inside the workshop", "by the window",
        ),
        (
            "before the rain began", "on a cold evening", "without saying much", "for the second time",
            "after the meeting", "early in the spring", "while the others slept", "with great patience",
            "as the bells rang", "for no clear reason", "shortly before noon", "during the holidays", "once a week",
            "until it grew dark", "in spite of the noise", "when the road was open again",
        ),
    ),
    places=(
        "Oslo", "Lima", "Cairo", "Hanoi", "Quito", "Dublin", "Athens", "Boston", "Delhi", "Geneva", "Havana", "Kyoto",
        "London", "Madrid", "Nairobi", "Ottawa", "Paris", "Prague", "Rome", "Seoul", "Sydney", "Tunis", "Venice",
        "Vienna", "Warsaw", "Zurich", "Berlin", "Dakar", "Denver", "Naples", "Porto", "Tokyo",
    ),
    secrets=(
        "anchor", "balloon", "blanket", "butter", "camel", "candle", "castle", "cherry", "copper", "diamond",
        "dragon", "feather", "forest", "guitar", "hammer", "helmet", "island", "jacket", "lantern", "lemon",
        "marble", "mirror", "monkey", "orange", "parrot", "pencil", "pillow", "rabbit", "silver", "tiger", "tunnel",
        "walnut",
    ),
    needle='The secret word of {place} is "',
    question="What is the secret word of {place}?",
    stop='".',
    space=" ",
)  # fmt: skip

CHINESE = Language(
    frame="{0}{4}{3}{1}{2}。",
    parts=(
        (
            "老园丁", "年轻的老师", "船长", "我的邻居", "守夜人", "退休的工程师", "面包师的女儿", "每个学生",
            "流浪的乐手", "她的叔叔", "安静的图书管理员", "两个木匠", "村里的医生", "诚实的商人", "最小的表弟",
            "一群登山者", "邮递员", "他的祖母", "博物馆的讲解员", "卖花的姑娘",
        ),
        (
            "搬走了", "修好了", "描述了", "照看着", "借走了", "画下了", "包好了", "数了数", "卖掉了", "找到了",
            "想起了", "擦干净了", "量了量", "忘记了", "带回了", "称赞了", "看见了", "收起了",
        ),
        (
            "一篮苹果", "那只坏了的钟", "几封信", "一把木椅", "备用的钥匙", "没画完的地图", "三把雨伞", "沉重的箱子",
            "早上的报纸", "新鲜的面包", "一盒钉子", "蓝色的自行车", "长长的绳子", "冬天的大衣", "一张旧照片",
            "一罐蜂蜜", "空瓶子", "一双靴子", "高高的梯子", "许多小石头",
        ),
        (
            "在河边", "在车站后面", "在厨房里", "在市场上", "在教堂旁边", "在楼上", "在桥下", "在海岸边",
            "在剧院外面",
            "在院子里", "在磨坊旁边", "在广场对面", "在路的尽头", "在作坊里", "在窗边",
        ),
        (
            "下雨之前", "寒冷的傍晚", "一言不发地", "第二次", "开会以后", "早春时节", "趁别人睡觉时", "非常耐心地",
            "钟声响起时", "不知为什么", "快到中午时", "放假期间", "每周一次", "直到天黑", "不顾吵闹",
            "道路重新开放后",
        ),
    ),
    places=(
        "北京", "上海", "广州", "成都", "杭州", "西安", "南京", "武汉", "苏州", "青岛", "大连", "厦门", "昆明",
        "长沙",
        "天津", "重庆", "哈尔滨", "拉萨", "桂林", "洛阳", "开封", "敦煌", "福州", "贵阳", "兰州", "南昌", "南宁",
        "沈阳",
        "太原", "温州", "无锡", "扬州",
    ),
    secrets=(
        "灯笼", "铁锚", "气球", "毛毯", "黄油", "骆驼", "蜡烛", "城堡", "樱桃", "铜钱", "钻石", "羽毛", "森林",
        "吉他", "锤子", "头盔", "海岛",
        "夹克", "茶壶", "柠檬", "镜子", "猴子", "橙子", "鹦鹉", "铅笔", "枕头", "兔子", "白银", "老虎", "隧道",
        "核桃", "风筝",
    ),
    needle="{place}的秘密词是“",
    question="{place}的秘密词是什么？",
    stop="”。",
    space="",
)  # fmt: skip

LANGUAGES = {"english": ENGLISH, "chinese": CHINESE}


def prose(language: Language, key: int) -> Iterator[str]:
    """Sentences without end."""
    number = 0
    while True:
        yield language.sentence(mix(key + 16 * number))
        number += 1


def folder(part: str) -> Path:
    """The documents are made, not read."""
    return Path(".")


def manifest(part: str) -> str:
    """What the documents depend on."""
    settings = f"needles {part} {DERIVATION_VERSION} {CHAT_FORMAT} {DOCUMENTS} {LANGUAGES[part]!r}"
    return hashlib.sha256(settings.encode()).hexdigest()


def input_bytes(part: str) -> int:
    """Measured, within a few percent."""
    return {"english": 21_200_000, "chinese": 17_400_000}[part]


def documents(part: str) -> Iterator[Document]:
    """Conversations: prose with some needles at random places, and a question about each of them.

    As conversations, because only the answers are then trained on. In plain text the secrets are one token in twenty of
    those with a loss, and the noise of the others hides what they teach: at 5M parameters and 2,048 tokens a step,
    nothing was learned in 225 steps, against 60 steps when the answers alone count.
    """
    for number in range(DOCUMENTS):
        messages = conversation(LANGUAGES[part], derive_key("needle document", part, number))
        yield Document(f"{part}/{number}", messages=messages)


def conversation(language: Language, key: int) -> tuple[Message, ...]:
    """One training document; a function of the key."""

    def draw(size: int) -> int:
        nonlocal key
        key = mix(key + 0x9E3779B97F4A7C15)
        return key % size

    span = math.log(MOST_SENTENCES / FEWEST_SENTENCES)
    count = round(FEWEST_SENTENCES * math.exp(span * draw(1 << 20) / (1 << 20)))
    needles: dict[str, Needle] = {}
    for _ in range(1 + draw(2) * draw(MOST_NEEDLES)):
        needle = language.needle_of(derive_key(draw(1 << 60)))
        needles.setdefault(needle.prompt, needle)  # two secrets of one place would contradict each other
    sentences = [sentence for sentence, _ in zip(prose(language, derive_key(draw(1 << 60))), range(count))]
    for needle in needles.values():
        sentences.insert(draw(len(sentences) + 1), needle.sentence)
    asked = list(needles.values())
    first = draw(len(asked))
    messages: list[Message] = []
    for needle in (*asked[first:], *asked[:first]):
        before = f"{language.space.join(sentences)}\n\n" if not messages else ""
        messages += [Message("user", before + needle.question), Message("assistant", needle.sentence)]
    return tuple(messages)
