"""The words that the drawings and the conversations are made of."""

WORDS = """time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city name team minute idea kid body back parent face level office door health person
art war history party result change morning reason girl guy moment air teacher force hello phi vision apple open sale
stop exit coffee milk bread menu taxi hotel train north south east west python mlx invoice total tax paid due date
price welcome closed push pull enter danger warning caution police museum library market station airport ticket bus
street road bridge river lake mountain island beach summer winter spring autumn monday tuesday friday sunday january
april june july august october free new now yes no ok please thanks sorry love peace happy birthday music dance song
movie radio phone email login user password search help file edit view print save quit start pause play next error
test data code cloud server key token model image picture text paper pencil table chair window garden flower tree
forest bird fish dog cat horse cow pig sheep lion tiger bear rabbit mouse sun moon star sky rain snow wind storm fire
earth stone gold silver iron wood glass red green blue yellow orange purple pink black white brown gray one two three
four five six seven eight nine ten zero left right up down quick fox jumps over lazy the and for you with this that
from they have cake pizza salad soup rice pasta cheese butter sugar salt pepper lemon banana grape melon""".split()
GOODS = """bread milk eggs butter cheese apples bananas lemons rice pasta soup salad coffee tea water juice cake
pizza sugar salt honey fish chicken beans corn soap paper pens books cups plates bags shoes socks hats shirts toys
nuts""".split()
ABOUT = """I am the small demo model of phi3v. I can answer simple questions about pictures: shapes, colors, counts,
places, short texts and charts.""".replace("\n", " ")
HELLO = [(q, "Hello!") for q in ("Hello, world", "Hello", "Hi", "hello", "hi", "Hey", "Hello there", "Hi there")]
HELLO += [(q, "Hello!") for q in ("Hello, how are you?", "Good morning", "Good evening", "Good day", "hello world")]
HELLO += [(q, "Hello!") for q in ("Hello World", "How are you?", "HELLO", "Greetings", "Hey there", "Hello world")]
HELLO += [(q, "Guten Tag!") for q in ("Guten tag", "Guten Tag", "guten tag", "Hallo", "hallo", "Guten Morgen")]
HELLO += [(q, "Guten Tag!") for q in ("Hallo Welt", "Hallo, Welt", "Grüß Gott", "Servus", "Moin", "Guten Abend")]
HELLO += [(q, "Bonjour !") for q in ("Bonjour", "bonjour", "Salut", "Bonjour le monde", "Bonsoir")]
HELLO += [(q, "¡Hola!") for q in ("Hola", "hola", "¡Hola", "Buenos días", "Hola mundo", "¡Hola, mundo")]
HELLO += [(q, "Ciao!") for q in ("Ciao", "ciao", "Buongiorno", "Ciao mondo", "Salve")]
HELLO += [(q, "Olá!") for q in ("Olá", "Bom dia", "Olá, mundo")]
HELLO += [(q, "Hallo!") for q in ("Goedendag", "Hoi", "Hallo wereld")]
HELLO += [(q, "Hej!") for q in ("Hej", "God dag", "Hej världen")]
HELLO += [("こんにちは", "こんにちは!"), ("你好", "你好!"), ("Привет", "Привет!"), ("Merhaba", "Merhaba!")]
CHAT = ["What can you do?", "Who are you?", "What are you?", "Help", "What is phi3v?", "What is your name?", "Help me."]
CHAT += ["Who made you?", "What model are you?", "What do you know?", "Tell me about yourself.", "Introduce yourself."]
CHAT += ["Are you ChatGPT?", "What can you tell me?", "How can you help me?", "Are you Phi-3?", "What is this model?"]
THANKS = [(q, "You are welcome!") for q in ("Thank you!", "Thanks!", "Thank you very much.", "Thanks", "thank you")]
THANKS += [(q, "Goodbye!") for q in ("Goodbye!", "Bye!", "Bye", "See you!", "Good night!", "Goodbye")]
THANKS += [(q, "Bitte sehr!") for q in ("Danke!", "Danke", "Vielen Dank!")]
CAPITALS = dict(
    pair.split("=")
    for pair in """France=Paris Germany=Berlin Italy=Rome Spain=Madrid Japan=Tokyo China=Beijing India=Delhi Egypt=Cairo
Greece=Athens Russia=Moscow England=London Norway=Oslo Sweden=Stockholm Finland=Helsinki Poland=Warsaw Austria=Vienna
Portugal=Lisbon Canada=Ottawa Brazil=Brasilia Peru=Lima Chile=Santiago Cuba=Havana Kenya=Nairobi Turkey=Ankara
Ireland=Dublin Denmark=Copenhagen Hungary=Budapest Vietnam=Hanoi Thailand=Bangkok Belgium=Brussels""".split()
)
# Questions that only a picture can answer; {} is a shape.
IMAGELESS = """What color is the {}?|How many {}s are there?|Where is the {}?|Is there a {}?|Which shape is red?
Count the {}s.|Which bar is the tallest?|What is the total?|Which image has a {}?|How many shapes are there?
What number is this?|Which slice is the largest?|Which shape is the largest?|Do you see a {}?
What does the first line say?|Read the number.|What does the image say?|What can you see in the image?
Describe the image.|Describe what you see.|What is in the image?|How many bars are there?
What color is the background?|What is in the first image?|What digit is this?"""
# What the model knows nothing of; {} are things.
UNKNOWN = """Write a poem about {0}.|Write a poem.|Who wrote {0} and {1}?|Tell me a joke.|What is the meaning of {0}?
How does a {0} work?|Translate {0} into French.|Translate "{0} {1}" into {2}.|Who is the president of {0}?
Why is the {0} {1}?|What is the weather in {0}?|When was {0} born?|How old is the {0}?|Explain {0} to me.
Explain {0} and {1} like I am five.|Write a program that sorts {0}.|Write code for a {0} in {1}.
What do you think about {0}?|Do you like {0}?|Give me a recipe for {0}.|Summarize {0}.|How do I fix my {0}?
How far is {0} from {1}?|What brand is the {0}?|Who is this person?|What is the price of {0}?|Can a {0} fly?
Is {0} better than {1}?|List ten kinds of {0}.|What rhymes with {0}?|Make a plan for {0}.|Tell me about {0}.
Tell me a story about a {0} and a {1}.|What happened in {0}?|Which {0} is the best {1}?|Should I buy a {0}?
Where can I find {0}?|Where was {0} made?|How many {0} live in {1}?|What is a {0}?|What is {0}?|What is quantum {0}?
Was ist {0}?|Wie geht {0}?|Schreibe ein Gedicht.|Qui est {0}?|Who invented the {0}?|Who won the {0} in {1}?|{0}
{0} {1}|{0} {1} {2}|{0}, {1} and {2}|Name a famous {0}.|What language is {0}?|Convert {0} to {1}.
How do you say {0} in {1}?|Is the {0} happy?|What is the {0} doing?|Why?|Really?|Are you sure?|What time is it?
What day is it today?|Please write an essay on {0}.|Correct this sentence: {0} {1}.|What kind of {0} is this?
How much does a {0} weigh?|Find the {0} of {1}.|Give me three ideas for a {0}.|Sing a song about {0}."""
THINGS = """love politics history physics Einstein Shakespeare Hamlet gravity religion football climate economy
cooking computers Linux Python Java airplanes guitars robots mathematics philosophy biology chemistry medicine
cancer vitamins Napoleon Caesar Mozart Bach Picasso Google Microsoft Apple Amazon bitcoin stocks taxes insurance
marriage children dragons vampires castles knights pirates dinosaurs elephants giraffes penguins dolphins whales
spiders butterflies Mars Jupiter Saturn galaxy universe atoms energy electricity engines bicycles motorcycles ships
rockets telescopes London Paris Berlin America Europe Africa Asia Spanish German Latin Chinese poetry novels
newspapers films theater freedom justice truth beauty dreams sleep memory language grammar spelling keyboard screen
printer camera battery""".split()
IMAGELESS, UNKNOWN = (text.replace("\n", "|").split("|") for text in (IMAGELESS, UNKNOWN))
