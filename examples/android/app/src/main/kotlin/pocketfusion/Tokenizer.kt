package pocketfusion

/** Ids and mask of a prompt, both of the text encoder's length; `count` of them are no padding. */
class Tokens(val ids: IntArray, val mask: IntArray, val count: Int)

/** A bundle's tokenizer.json, WordPiece or CLIP's byte pairs, with the manifest's `tokenizer`; docs/port.md has the rules. */
class Tokenizer(file: Any?, private val spec: Any?, private val unicode: Unicode) {
    private class Added(val name: List<Int>, val id: Int)
    private class Part(val text: List<Int>, val id: Int?)

    private val model = file["model"]
    private val wordPiece = model["type"] == "WordPiece"
    private val vocabulary = model["vocab"].fields().mapValues { it.value.int() }
    private val prefix = (model["continuing_subword_prefix"] ?: "").string()
    private val suffix = (model["end_of_word_suffix"] ?: "").string()
    private val unknown = model["unk_token"]?.string()
    private val ranks = HashMap<Pair<String, String>, Int>()
    private val normalizers = file["normalizer"].let { if (it["type"] == "Sequence") it["normalizers"].items() else listOf(it) }
    private val raw: List<Added>
    private val normalized: List<Added>
    private val before = ArrayList<Int>()
    private val after = ArrayList<Int>()

    init {
        if (!wordPiece) {
            model["merges"].items().forEachIndexed { rank, merge ->
                val (a, b) = if (merge is String) merge.split(" ") else merge.items().map { it.string() }
                ranks[a to b] = rank
            }
        }
        val tokens = file["added_tokens"].items().sortedByDescending { codePoints(it["content"].string()).size }
        raw = tokens.filter { it["normalized"] == false }.map { Added(codePoints(it["content"].string()), it["id"].int()) }
        normalized = tokens.filter { it["normalized"] == true }
            .map { Added(normalize(codePoints(it["content"].string())), it["id"].int()) }
        val post = file["post_processor"]
        if (post["type"] == "TemplateProcessing") {
            var side = before
            for (part in post["single"].items()) {
                if (part["Sequence"] != null) side = after
                else side += post["special_tokens"][part["SpecialToken"]["id"].string()]["ids"].items()[0].int()
            }
        } else {
            before += post["cls"].items()[1].int()
            after += post["sep"].items()[1].int()
        }
    }

    fun encode(prompt: String): Tokens {
        val ids = ArrayList<Int>()
        for (part in without(codePoints(prompt), raw)) {
            if (part.id != null) {
                ids += part.id
                continue
            }
            for (inner in without(normalize(part.text), normalized)) {
                if (inner.id != null) ids += inner.id
                else for (word in words(inner.text)) ids += if (wordPiece) wordPieces(word) else bytePairs(word)
            }
        }
        val length = spec["max_length"].int()
        val whole = before + ids.take(length - before.size - after.size) + after
        val padding = spec["pad_token_id"].int()
        return Tokens(
            IntArray(length) { whole.getOrElse(it) { padding } },
            IntArray(length) { if (it < whole.size) 1 else 0 },
            whole.size,
        )
    }

    /** The text between the added tokens in it, and these: the leftmost first, of several the longest. */
    private fun without(text: List<Int>, added: List<Added>): List<Part> {
        val parts = ArrayList<Part>()
        var start = 0
        var i = 0
        while (i < text.size) {
            val found = added.firstOrNull { startsWith(text, i, it.name) }
            if (found == null) {
                i++
                continue
            }
            if (i > start) parts += Part(text.subList(start, i), null)
            parts += Part(emptyList(), found.id)
            i += found.name.size
            start = i
        }
        if (start < text.size) parts += Part(text.subList(start, text.size), null)
        return parts
    }

    private fun normalize(given: List<Int>): List<Int> {
        var text = given
        for (step in normalizers) {
            text = when (step["type"]) {
                "BertNormalizer" -> bert(text, step)
                "NFC" -> unicode.compose(text)
                "Lowercase" -> unicode.lower(text)
                else -> if (step["pattern"]["Regex"] != null) joinSpaces(text) else learnt(text, step)
            }
        }
        return text
    }

    private fun bert(text: List<Int>, step: Any?): List<Int> {
        var made = text.filter { !unicode.isOf("dropped", it) }.flatMap {
            when {
                unicode.isOf("spaces", it) -> listOf(0x20)
                unicode.isOf("ideographs", it) -> listOf(0x20, it, 0x20)
                else -> listOf(it)
            }
        }
        if ((step["strip_accents"] ?: step["lowercase"]) == true) {
            made = unicode.decompose(made).filter { !unicode.isOf("accents", it) }
        }
        return if (step["lowercase"] == true) unicode.lower(made) else made
    }

    private fun joinSpaces(text: List<Int>): List<Int> {
        val space = text.map { unicode.isOf("spaces", it) }
        return text.indices.filter { !(space[it] && it > 0 && space[it - 1]) }.map { if (space[it]) 0x20 else text[it] }
    }

    /** A learnt token's name becomes the letters that stand for its vectors. */
    private fun learnt(text: List<Int>, step: Any?): List<Int> {
        val name = Added(codePoints(step["pattern"]["String"].string()), 0)
        val content = codePoints(step["content"].string())
        return without(text, listOf(name)).flatMap { if (it.id == null) it.text else content }
    }

    private fun words(text: List<Int>): List<List<Int>> {
        val words = ArrayList<List<Int>>()
        fun isOf(set: String, i: Int) = i < text.size && unicode.isOf(set, text[i])
        var i = 0
        while (i < text.size) {
            var end = i + 1
            if (isOf("spaces", i)) {
                i++
                continue
            }
            if (wordPiece) {
                if (!isOf("punctuation", i)) {
                    while (end < text.size && !isOf("spaces", end) && !isOf("punctuation", end)) end++
                }
            } else {
                val fixed = FIXED.firstOrNull { startsWith(text, i, it) }
                if (fixed != null) end = i + fixed.size
                else if (isOf("letters", i)) while (isOf("letters", end)) end++
                else if (!isOf("numbers", i)) {
                    while (end < text.size && !isOf("spaces", end) && !isOf("letters", end) && !isOf("numbers", end)) end++
                }
            }
            words += text.subList(i, end)
            i = end
        }
        return words
    }

    private fun wordPieces(word: List<Int>): List<Int> {
        val whole = listOf(vocabulary.getValue(unknown!!))
        if (word.size > model["max_input_chars_per_word"].int()) return whole
        val ids = ArrayList<Int>()
        var start = 0
        while (start < word.size) {
            var end = word.size
            var id: Int? = null
            while (end > start) {
                id = vocabulary[(if (start > 0) prefix else "") + string(word.subList(start, end))]
                if (id != null) break
                end--
            }
            ids += id ?: return whole
            start = end
        }
        return ids
    }

    private fun bytePairs(word: List<Int>): List<Int> {
        val bytes = string(word).toByteArray()
        var parts: List<String> = bytes.indices.mapNotNull { i ->
            val part = LETTERS[bytes[i].toInt() and 255] + if (i == bytes.size - 1) suffix else ""
            if (part in vocabulary) part else unknown
        }
        while (parts.size > 1) {
            val best = parts.zipWithNext().filter { it in ranks }.minByOrNull { ranks.getValue(it) } ?: break
            val made = ArrayList<String>()
            var i = 0
            while (i < parts.size) {
                if (i + 1 < parts.size && parts[i] == best.first && parts[i + 1] == best.second) {
                    made += parts[i] + parts[i + 1]
                    i++
                } else {
                    made += parts[i]
                }
                i++
            }
            parts = made
        }
        return parts.map { vocabulary.getValue(it) }
    }

    private companion object {
        /** GPT-2's printable character for each byte: itself where it is one, else those from U+0100 on. */
        val LETTERS: List<String> = run {
            var next = 256
            List(256) { byte ->
                val printable = byte in 33..126 || byte in 161..255 && byte != 173
                string(listOf(if (printable) byte else next++))
            }
        }
        val FIXED = listOf("'s", "'t", "'re", "'ve", "'m", "'ll", "'d").map(::codePoints)

        fun startsWith(text: List<Int>, at: Int, name: List<Int>): Boolean =
            name.isNotEmpty() && at + name.size <= text.size && name.indices.all { text[at + it] == name[it] }

        fun string(text: List<Int>): String = text.fold(StringBuilder()) { made, c -> made.appendCodePoint(c) }.toString()
    }
}

/** Half of a character pair becomes U+FFFD. */
fun codePoints(text: String): List<Int> = text.codePoints().toArray().map { if (it in 0xD800..0xDFFF) 0xFFFD else it }
