package pocketfusion

/**
 * unicode.json: what each code point counts as. The phone's own tables are of whatever Unicode version its Android has,
 * and token ids must not depend on that.
 */
class Unicode(data: Any?) {
    private val sets = listOf("dropped", "spaces", "ideographs", "accents", "punctuation", "letters", "numbers")
        .associateWith { name -> data[name].items().map { it.items()[0].int() to it.items()[1].int() } }
    private val lower = table(data["lower"])
    private val decomposed = table(data["decomposed"])
    private val classes = HashMap<Int, Int>()
    private val composed = HashMap<Pair<Int, Int>, Int>()

    init {
        for (row in data["classes"].items()) {
            val (first, last, order) = row.items().map { it.int() }
            for (c in first..last) classes[c] = order
        }
        for (row in data["composed"].items()) {
            val (a, b, c) = row.items().map { it.int() }
            composed[a to b] = c
        }
    }

    fun isOf(set: String, c: Int): Boolean {
        val ranges = sets.getValue(set)
        val after = ranges.binarySearch { (first, _) -> if (first <= c) -1 else 1 }.inv()
        return after > 0 && ranges[after - 1].second >= c
    }

    fun lower(text: List<Int>): List<Int> = text.flatMap { lower[it] ?: listOf(it) }

    fun decompose(text: List<Int>): List<Int> {
        val made = ArrayList<Int>()
        for (c in text) {
            if (c in 0xAC00 until 0xD7A4) { // Hangul
                val index = c - 0xAC00
                made += 0x1100 + index / 588
                made += 0x1161 + index % 588 / 28
                if (index % 28 > 0) made += 0x11A7 + index % 28
            } else {
                made += decomposed[c] ?: listOf(c)
            }
        }
        var start = 0
        while (start < made.size) { // marks by class, those of one class as they stand
            var end = start
            while (end < made.size && order(made[end]) > 0) end++
            made.subList(start, end).sortBy { order(it) }
            start = maxOf(end, start + 1)
        }
        return made
    }

    fun compose(text: List<Int>): List<Int> {
        val made = ArrayList<Int>()
        var starter = -1
        var before = 0 // the class of the last one that stayed behind the starter
        for (c in decompose(text)) {
            val order = order(c)
            if (starter >= 0 && (before < order || before == 0 && starter == made.size - 1)) {
                val joined = join(made[starter], c)
                if (joined != null) {
                    made[starter] = joined
                    continue
                }
            }
            if (order == 0) starter = made.size
            before = order
            made += c
        }
        return made
    }

    private fun order(c: Int): Int = classes[c] ?: 0

    private fun join(a: Int, b: Int): Int? = when {
        a in 0x1100 until 0x1113 && b in 0x1161 until 0x1176 -> 0xAC00 + ((a - 0x1100) * 21 + b - 0x1161) * 28
        a in 0xAC00 until 0xD7A4 && (a - 0xAC00) % 28 == 0 && b in 0x11A8 until 0x11C3 -> a + b - 0x11A7
        else -> composed[a to b]
    }

    private fun table(rows: Any?): Map<Int, List<Int>> =
        rows.items().associate { row -> row.items().map { it.int() }.let { it[0] to it.drop(1) } }
}
