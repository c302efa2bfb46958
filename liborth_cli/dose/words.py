"""Words that decoys are filled with: common enough for any tokenizer, and nobody's secret."""

_FIRST_NAMES = """
Agnes Akira Alban Amara Anouk Arvid Asha Bashir Beatriz Bjorn Carmen Cedric Chiara Cyrus Dagmar Damir Delia Dmitri Edda
Elias Emeka Estelle Fabian Farah Fergus Fiona Gideon Gwen Hadiya Harald Helga Hiro Ida Ignacio Imani Ines Isolde Ivo Jamal
Jasper Jelena Joaquin Kaito Katya Keziah Laszlo Leila Lorenzo Lucia Magnus Mariam Mateo Mei Milan Miriam Nadia Naveen
Nikolai Noor Octavia Olaf Oscar Paloma Petra Pierre Priya Rafael Ramona Ravi Rhea Rosalind Rufus Sabine Samir Saskia Selma
Sergei Silvia Simon Sunita Tamar Tariq Thea Theodor Tobias Uma Valeria Vikram Wendel Wilma Yusuf Zahra Zora
"""
_LAST_NAMES = """
Abbott Adeyemi Albrecht Almeida Andersen Banerjee Barros Bellamy Bergman Blake Bouchard Calloway Castro Chen Cooper Costa
Dalton Delgado Demir Dubois Eriksen Farrell Ferreira Fischer Fontaine Gallo Garrett Gupta Hansen Hartley Hoffmann Hughes
Ibrahim Ivanov Jansen Kaplan Keller Khan Kimura Kowalski Kruger Lambert Larsen Lindgren Lopez Marchetti Meyer Mori Moreau
Nakamura Novak Okafor Olsen Ortega Osman Park Patel Pereira Petrov Quigley Ramirez Reyes Rossi Sato Schmidt Silva Sorensen
Suzuki Takeda Thorne Tran Turner Vasquez Vogel Walsh Weber Winter Yamada Yilmaz Zhang Zimmer
"""
_COMMON = """
amber anchor apple arrow autumn bamboo basket beacon bird bottle branch bridge bronze butter candle canyon castle cedar
chalk cherry circle cliff cloud copper coral cotton crystal desert dinner dragon eagle ember engine feather field fire
flower forest fountain garden ginger glass golden granite grape green hammer harbor hazel honey island ivory jacket jungle
kettle ladder lantern lemon linen marble meadow mirror morning mountain needle north ocean olive orange orchid oven paper
pepper piano pillow pine planet pocket poppy quiet rabbit rain ribbon river rocket rose saddle sailor salt sand silver snow
spring square stone summer sunset table thunder tiger timber tower tunnel valley velvet violet walnut water whisper willow
window winter wonder yellow
"""
FIRST_NAMES = tuple(_FIRST_NAMES.split())
LAST_NAMES = tuple(_LAST_NAMES.split())
COMMON = tuple(_COMMON.split())
MAIL_HOSTS = ("example.com", "example.org", "example.net", "mail.example", "post.example")
