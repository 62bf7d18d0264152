"""The words of the small world: plain data, written by hand for this project."""

# ruff: noqa: SIM905 (lists of plain words read best as one string)

WOMEN = (
    "Ada Agnes Anya Bea Berta Brita Celia Clara Dana Dora Edda Elin Elsa Emma Esme Eva Fanny Flora "
    "Gerda Gilda Greta Hanna Hazel Helen Ida Ilse Inga Irma Isla Jana Joan Judith Karen Kira Klara Lea "
    "Lia Lilly Lucy Mara Marta Mila Mona Myra Nancy Nina Nora Paula Pia Polly Rita Runa Ruth Selma "
    "Susan Tessa Tilda Ursula Vera Yara"
).split()
MEN = (
    "Abel Adam Alec Anton Arno Arthur Basil Ben Bruno Carl Casper Cyril Daniel Davin Dirk Elias Emil "
    "Eric Felix Finn Fred Gregor Gustav Harald Henry Hugo Ingo Jack Jacob Jens Jonas Karl Klaus Lars "
    "Leon Linus Magnus Malte Max Moritz Ned Noah Omar Oren Otto Pavel Peter Ralf Robin Rolf Samson "
    "Simon Sven Theo Tobias Udo Uwe Walter Wim Yusuf"
).split()
TOWNS = (
    "Harrow Brindle Calder Dunmore Elstow Fenwick Garth Holm Ivel Kelby "
    "Larkhill Morven Norwick Oakham Penrith Quarley Rushton Selby Thorpe Wexley"
).split()
RIVERS = "Alder Brisk Coll Dart Esk Flint Glen Hasp Isle Jura".split()
GOODS = "wool glass paper honey bells ropes salt tiles boots clocks".split()
JOBS = (
    "baker doctor farmer painter sailor teacher weaver miller actor cook judge mason pilot smith tailor gardener"
).split()
PETS = "cat dog goat owl rabbit horse parrot turtle duck ferret mouse snake".split()
COLOURS = "red blue green yellow white black purple pink brown grey".split()
FOODS = "soup bread cheese rice plums apples fish beans carrots cake nuts pears eggs figs corn stew".split()

# (one, many)
CREATURES = (
    ("cat", "cats"),
    ("dog", "dogs"),
    ("bird", "birds"),
    ("child", "children"),
    ("girl", "girls"),
    ("boy", "boys"),
    ("man", "men"),
    ("woman", "women"),
    ("horse", "horses"),
    ("mouse", "mice"),
    ("farmer", "farmers"),
    ("sailor", "sailors"),
    ("baker", "bakers"),
    ("goat", "goats"),
    ("fox", "foxes"),
    ("king", "kings"),
    ("nurse", "nurses"),
    ("wolf", "wolves"),
    ("sheep dog", "sheep dogs"),
    ("hen", "hens"),
)
THINGS = (
    ("house", "houses"),
    ("tree", "trees"),
    ("wall", "walls"),
    ("gate", "gates"),
    ("boat", "boats"),
    ("bridge", "bridges"),
    ("box", "boxes"),
    ("field", "fields"),
    ("hill", "hills"),
    ("barn", "barns"),
    ("table", "tables"),
    ("tower", "towers"),
    ("cart", "carts"),
    ("well", "wells"),
    ("bench", "benches"),
)
ADJECTIVES = ("hungry tired happy quiet small old young strong thirsty angry brave lazy clever sad kind cold").split()
PREPOSITIONS = ("near", "behind", "beside", "in front of", "next to", "under", "by")
TIMES = ("every day", "every morning", "in the evening", "at noon", "all day", "every winter", "after dinner")
# (base, third person, past) of verbs that need no object
ACTIONS = (
    ("run", "runs", "ran"),
    ("sleep", "sleeps", "slept"),
    ("sing", "sings", "sang"),
    ("play", "plays", "played"),
    ("work", "works", "worked"),
    ("wait", "waits", "waited"),
    ("eat", "eats", "ate"),
    ("swim", "swims", "swam"),
    ("dance", "dances", "danced"),
    ("shout", "shouts", "shouted"),
    ("jump", "jumps", "jumped"),
    ("rest", "rests", "rested"),
)
# (base, third person, past, participle) of verbs that take an object; past and participle differ
DEEDS = (
    ("eat", "eats", "ate", "eaten"),
    ("take", "takes", "took", "taken"),
    ("see", "sees", "saw", "seen"),
    ("give away", "gives away", "gave away", "given away"),
    ("hide", "hides", "hid", "hidden"),
    ("draw", "draws", "drew", "drawn"),
    ("break", "breaks", "broke", "broken"),
    ("steal", "steals", "stole", "stolen"),
    ("choose", "chooses", "chose", "chosen"),
    ("forget", "forgets", "forgot", "forgotten"),
)
SIGHTS = ("saw", "found", "heard", "followed", "watched", "liked", "met")
OBJECTS = (
    "kite coin ring book hat ball cup bell drum map key spoon shell doll flute rope stone feather mask scarf"
).split()
CONTAINERS = "box basket drawer bag chest jar bucket cupboard pocket barrel".split()
PLACES = "market mill school garden bridge harbour forest church square library lake barn".split()
VOWEL_FOODS = "apple egg onion orange olive".split()
OTHER_FOODS = "pear plum carrot melon lemon cake".split()
OPENERS = (
    "One morning",
    "Last week",
    "One day",
    "On Sunday",
    "Early in spring",
    "Late in autumn",
    "Yesterday",
    "One evening",
)
# (why, what is taken)
WEATHER = (
    ("It was raining hard", "umbrella"),
    ("Deep snow lay on the road", "warm coat"),
    ("The sun was burning hot", "straw hat"),
    ("The night was dark", "lamp"),
    ("The road was full of mud", "high boots"),
    ("The wind was icy", "woollen scarf"),
    ("The lake was frozen", "skates"),
    ("The way was long and steep", "walking stick"),
)
# (wish, tool)
TOOLS = (
    ("cut the bread", "knife"),
    ("write a letter", "pen"),
    ("open the locked door", "key"),
    ("mend the shirt", "needle"),
    ("dig a hole", "spade"),
    ("paint the fence", "brush"),
    ("catch a fish", "net"),
    ("sweep the floor", "broom"),
    ("climb on the roof", "ladder"),
    ("cut down the tree", "axe"),
    ("cross the lake", "boat"),
    ("ring for lunch", "bell"),
    ("drive in the nail", "hammer"),
    ("boil the soup", "pot"),
    ("weigh the flour", "scales"),
    ("tie up the goat", "rope"),
)
# (event, feeling)
FEELINGS = (
    ("lost the only key", "worried"),
    ("won the big race", "proud"),
    ("heard a strange noise in the night", "afraid"),
    ("walked the whole day", "tired"),
    ("had nothing to eat all day", "hungry"),
    ("got a fine present", "happy"),
    ("saw the old dog die", "sad"),
    ("found the cake stolen", "angry"),
    ("stood in the snow for an hour", "cold"),
    ("drank no water all day", "thirsty"),
)
