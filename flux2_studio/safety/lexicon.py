"""Word lists for the prompt rules, by meaning. Data only; no list is refused by itself.

Commas or newlines separate terms. `*` at the end stands for any ending, (a|b) for either, a blank for anything between
words. Terms are folded like prompts (`spelling.fold_accents`): lower case, no accents except ñ. Terms in scripts
without blanks or with other word endings (Chinese, Japanese, Korean, Arabic, Hindi, Thai) match anywhere.

Words with a common harmless meaning (cock, dick, tits, ass, anal, strip) are left out: the picture check covers them.
"""

# ruff: noqa: RUF001 - letters of other alphabets are the point

from __future__ import annotations

# Removed before the other lists are matched.
HARMLESS = """
sexual health, (no more|stop|end|against|prevent|preventing) (sex|sexual|child sexual) (abuse|violence|assault)
baby (macaque|macaques|ape|apes|chimpanzee|gorilla|orangutan|kangaroo|koala|pig|lamb|duck|deer)
baby (blue|pink|yellow|green|grey|gray|lilac|shower|grand|corn|carrot|carrots|spinach|breath|s breath|bump|carriage)
baby (elephant|bird|birds|mouse|mice|rat|rats|mole|rabbit)
baby (panda|penguin|seal|dragon|yoda|groot|monkey|goat|hedgehog|owl)
baby (chick|squirrel|bear|fox|turtle|hippo|dolphin|whale|doll), babydoll, rosemary s baby
kid (goat|goats|gloves|leather)
child s pose, flower child, destiny s child, inner child, teenage mutant ninja turtles, teen (titans|wolf)
nude (color|colour|colors|colours|colored|coloured|palette|tone)
nude (tones|shade|shades|hue|hues|beige|pink|brown|background)
nude (lipstick|lips|lip|makeup|make up|eyeshadow|blush|nail)
nude (nails|polish|manicure|heels|pumps|shoes|sandals|boots|tights)
nude (stockings|leather|dress|gown|fabric|silk|lace|coat|bag|handbag|undertone|undertones|matte|gloss|look)
naked (eye|eyes|truth|cake|cakes|flame|flames|bulb)
naked (bulbs|light bulb|mole rat|mole rats|tree|trees|branch|branches|twigs)
naked (wire|wires|blade|sword|rock|rocks|wood|brick)
naked (bricks|lunch|neck chicken|neck chickens|singularity|gun|oats|barley)
naked (king|emperor|bike), emperor (is|was) naked
(nude|naked) (marble|bronze|stone|greek|roman|ancient|classical) (statue|statues|sculpture|sculptures|bust|torso)
(nude|naked) (statue|statues|sculpture|sculptures|mannequin|mannequins|figurine|figurines)
(chicken|turkey|duck|goose|pigeon|pheasant) (breast|breasts), breasts of (chicken|duck|turkey|goose|veal|lamb)
(food|ruin|earth|space|word|desk|cabin|car|architecture) porn
sex of (the|a|an|its|their|this|each|my), (same|opposite|either|both|fair|fairer|third) (sex|sexes)
sex and the city
sex (chromosome|chromosomes|education|pistols|ratio|ratios)
sex (determination|symbol|hormone|hormones|discrimination|equality)
(sexual|asexual) (reproduction|dimorphism|selection|maturity|orientation|harassment), sexual assault awareness
(sexual assault|sexual abuse|sexual violence|rape) (awareness|prevention|survivor|survivors)
(sexual assault|sexual abuse|sexual violence|rape) (helpline|support|hotline|charity)
sexy (car|cars|motorcycle|motorbike|sports car|saxophone)
oilseed rape, rape (field|fields|seed|seeds|blossom|blossoms|flower|flowers|oil|plant|plants|honey)
(pornstar|porn star) martini
rape of (the sabine|the sabines|the lock|proserpina|persephone|europa|lucretia|lucrece|helen)
nackt(schnecke|schnecken|mull|mulle|samer), nacktes (auge|bein), mit bloßem auge, œil nu, a l œil nu, ojo desnudo
a ojo desnudo, occhio nudo, olho nu, color desnudo
裸眼, 裸色, 裸粉, 裸机, 裸车, 裸婚, 裸足, 裸電球, 裸子植物, 裸麦, 赤裸裸, 누드톤, 누드 톤
"""

MINOR = """
child, children, childs, childlike, kid, kids, kiddie, toddler*, infant, infants, baby, babies, newborn*, preteen*
pre teen*
tween, tweens, teen, teens, teenage, teenaged, teenager*, adolescent*, underage*, under age, minors, preschool*
prepubescent*, pubescent*, juvenile, schoolgirl*, schoolboy*, school girl*, school boy*, schoolchild*, kindergarten*
(little|young|small|tiny|younger|preschool) (girl|girls|boy|boys), (little|young|small) \\w+ (girl|girls|boy|boys)
little (sister|brother), (elementary|primary|middle|high) school (girl|girls|boy|boys|student|students)
(elementary|middle|high) schooler*, (first|second|third|fourth|fifth|sixth|seventh|eighth) grader*, barely legal
loli, lolis, lolita, lolicon, shota, shotas, shotacon, jailbait
kinder, kindern, ein kind, das kind, kleines kind, kleinkind*, nacktes kind, kindlich*, kleine* madchen
junge* madchen
schulmadchen, minderjahrig*, saugling*, jugendliche*, kleiner junge, kleine jungen
enfant*, fillette*, gamine*, mineure, mineures, adolescente*, petite* fille*, petit* garcon*, bebe, bebes, ecoliere*
collegienne*, lyceenne*, niña, niñas, niño, niños, niñita*, menor de edad, menores de edad, colegiala*
bambin*, ragazzin*, minorenn*, neonat*, criança*, menina, meninas, menininha*, menino, meninos, menor de idade
kinderen, klein meisje, jong meisje, kleine meisjes, kleine jongen, peuter*, kleuter*, minderjarig*
dziecko, dzieci, dziewczynk*, nieletni*, cocuk*, bebek
ребен*, дети, детей, детьми, детск*, девочк*, мальчик*, школьни*, несовершеннолетн*, малолетн*, младен*, подрост*
儿童, 兒童, 小孩, 孩子, 幼女, 幼童, 女童, 男童, 萝莉, 蘿莉, 未成年, 小学生, 小學生, 初中生, 中学生, 中學生, 婴儿
嬰兒
小女孩, 小男孩, 小姑娘, 少女, 少年, 子供, 子ども, 幼児, 女児, 男児, 園児, 高校生, 赤ちゃん, 赤ん坊, ロリコン
ロリっ子, ショタ
어린이, 어린아이, 어린 소녀, 미성년, 소녀, 소년, 여자아이, 남자아이, 초등학생, 중학생, 여고생
طفل, أطفال, قاصر, बच्च, नाबालिग, เด็ก
"""

NUDE = """
nude, nudes, nudity, naked, nakedness, unclothed, undressed, undressing, unclad, topless, bottomless
bare (breast|breasts|chested girl)
bare (bottom|buttocks), without (any clothes|clothes|clothing|any clothing), no clothes, wearing nothing
in the nude
(penis|penises|vagina|vaginas|vulva|genitals|genitalia|genital|nipples)
nackt, nackte, nackten, nackter, nacktes, nacktem, splitternackt*, nacktbild*, nacktfoto*, unbekleidet*, entbloßt*
nue, nues, tout nu, toute nue, denude*, nudite, enfant* nu, bebe nu, sans vetement*
desnud*, sin ropa, nuda, nudo, nudi, nudita, senza vestiti, nua, nuas, pelad*, sem roupa, naakt, naakte, naked*
naga, nagi, nagie, nago, ciplak*
голый, голая, голое, голые, голых, голую, голого, голой, голыми, обнажен*, нагая, нагой, нагие, нагишом, раздет*
без одежды
裸, ヌード, 누드, 알몸, 나체, 벌거벗, عاري, عارية, عراة, नग्न, नंगा, नंगी, เปลือย
"""

EXPLICIT = """
porn, porno, pornos, pornographic, pornography, pornstar*, nsfw, hentai, xxx (photo|video|scene|movie)
(having|have|has|had|oral|anal|group|rough|penetrative|explicit|hardcore) sex
sex (act|acts|scene|scenes|tape|position|positions)
sexual (intercourse|act|acts|activity|penetration|position|positions|content), sexually explicit
(vaginal|anal) (intercourse|penetration), masturbat*, orgasm, orgasms, orgy, orgies, ejaculat*, cumshot*, blowjob*
blow job*
handjob*, deepthroat*, gangbang*, fellatio, cunnilingus, bukkake, erotica
pornografi*, geschlechtsverkehr, sexszene*, sex haben, haben sex, kinderporn*, pedoporn*, selbstbefriedig*, onanier*
pornographi*, rapport sexuel, rapports sexuels, scene de sexe, relaciones sexuales, teniendo sexo
sexo (explicito|oral|anal)
sesso (esplicito|orale|anale), rapporto sessuale, sexo explicito, fazendo sexo, geslachtsgemeenschap, seks hebben
порн*, секс сцен*, занимаются сексом, половой акт, мастурб*
色情, 性交, 做爱, 做愛, 性爱, 性愛, 淫, 口交, 自慰, セックス, ポルノ, エロ画像, 性行為, オナニー, 섹스, 포르노
성관계
إباحي, पोर्न, अश्लील, โป๊
"""

SUGGESTIVE = """
sex, sexy, sexual, sexually, sexualized, sexualised, erotic*, sensual*, seductive*, seducing, lewd, lustful, aroused
horny
kinky, fetish*, bdsm, bondage, lingerie, panties, thong, cleavage, boobs, breasts, striptease*, stripper*, twerking
spread legs, legs spread, spreading (her|his|their) legs, making love, wet t shirt
see through (dress|shirt|clothes)
sexuell*, erotisch*, reizwasche, dessous, sexe, sexuel*, erotique*, sexo, sexual*, erotic*, sesso, sessual*, seks*
sensuel*
секс*, эрот*, нижнее белье
性感, 情色, 内衣, 內衣, 诱惑, 誘惑, 下着, セクシー, パンチラ, 야한, 속옷, 섹시, جنس, सेक्स
"""

# Sexual violence in itself.
VIOLENT = """
rape, raped, raping, rapes, gang rape*, gangrape*
(sexual|sexually) (assault|assaulting|assaulted|abuse|abusing|abused)
molest*, upskirt*, revenge porn, zoophil*, bestiality, necrophil*
vergewaltig*, violer une (femme|fille), violacion sexual, stupr*, estupr*, verkracht*, gwalt*, изнасил*, 强奸, 強姦
レイプ, 강간
"""

# Makes sexual content violence.
FORCED = """
non consensual*, nonconsensual*, without (her|his|their) (consent|knowledge), against (her|his|their) will, coerced
forced (to|into|sex), forcing (her|him|them), is forced, are forced, drugged, unconscious, passed out
blackout drunk
hidden (camera|cam), spy (camera|cam), spycam*, voyeur*, secretly (filmed|photographed|recorded), peeping
gegen (ihren|seinen) willen, bewusstlos*, gezwungen, contre (son|sa) (gre|volonte), inconsciente, contra su voluntad
contro la sua volonta, contra a sua vontade, против (ее|его) воли, 偷拍, 盗撮, 迷奸, 몰카
"""

# An existing person.
SOMEBODY = """
deepfake*, deep fake*, celebrity, celebrities, famous (actress|actor|singer|model|person|woman|man|politician)
my (ex|neighbor|neighbour|coworker|co worker|colleague|boss)
my (teacher|classmate|crush|roommate|flatmate|student|sister|mother)
my (ex girlfriend|ex boyfriend|ex wife|ex husband|stepmother|stepsister)
my (aunt|cousin|professor|secretary|friend|friends)
(person|woman|man|girl|guy|lady|face) (in|from|of) (image|picture|photo|reference)
(person|woman|man|girl|guy|lady|face) (in|from|of) (the image|the picture|the photo|this photo)
(person|woman|man|girl|guy|lady|face) (in|from|of) (this picture|this image|my photo|the reference)
meine (ex|nachbarin|kollegin|lehrerin|schwester), mon ex, ma (voisine|collegue|prof)
mi (ex|vecina|profesora|compañera)
"""

# Common first names: followed by a surname, they may name an existing person. A few hundred would not be complete.
FIRST_NAMES = """
Adele Alexandra Alexandria Alicia Amanda Amber Amy Ana Angela Angelina Anna Anne Anya Ariana Ashley Barack Barbara
Beyonce Bill Billie Blake Brad Britney Camila Cardi Charlize Chris Christina David Demi Donald Dua Ed Elizabeth Ella
Elon Emilia Emily Emma Eva Evan Florence Gal George Gigi Giorgia Greta Gwyneth Halle Harry Heidi Helen Hillary Hugh
Ivanka
Jack Jacinda James Jane Jason Jeff Jennifer Jenna Jessica Jill Joe John Johnny Jude Julia Justin Kamala Karen Kate
Katy
Keanu Keira Kendall Kim Kristen Kylie Lana Laura Leonardo Lily Lisa Madison Margot Maria Marilyn Mark Mary Megan
Meghan
Melania Michael Michelle Mila Miley Millie Nancy Naomi Natalie Nicki Nicole Olivia Oprah Paris Penelope Pamela
Phoebe
Rachel Rihanna Robert Ryan Salma Sandra Sarah Scarlett Selena Serena Shakira Sofia Sophia Sophie Sydney Taylor Tom
Ursula Vanessa Victoria Vladimir Winona Xi Zendaya Zoe
"""
