package pocketfusion

/** JSON as maps, lists, strings, doubles, booleans and nulls: Android has a reader, but tests on a desktop do not. */
class Json private constructor(private val text: String) {
    private var at = 0

    private fun fail(): Nothing = throw IllegalArgumentException("broken JSON at character $at")

    private fun space() {
        while (at < text.length && text[at] in " \n\r\t") at++
    }

    private fun take(c: Char): Boolean {
        space()
        if (at >= text.length || text[at] != c) return false
        at++
        return true
    }

    private fun need(c: Char) {
        if (!take(c)) fail()
    }

    private fun string(): String {
        need('"')
        val out = StringBuilder()
        while (true) {
            val c = text.getOrElse(at++) { fail() }
            if (c == '"') return out.toString()
            if (c != '\\') {
                out.append(c)
                continue
            }
            when (val escape = text.getOrElse(at++) { fail() }) {
                'u' -> {
                    out.append(text.substring(at, at + 4).toInt(16).toChar())
                    at += 4
                }
                'n' -> out.append('\n')
                'r' -> out.append('\r')
                't' -> out.append('\t')
                'b' -> out.append('\b')
                'f' -> out.append('\u000c')
                else -> out.append(escape)
            }
        }
    }

    private fun value(): Any? {
        space()
        val rest = text.getOrElse(at) { fail() }
        if (rest == '"') return string()
        if (take('{')) {
            val fields = HashMap<String, Any?>()
            if (take('}')) return fields
            do {
                space()
                val name = string()
                need(':')
                fields[name] = value()
            } while (take(','))
            need('}')
            return fields
        }
        if (take('[')) {
            val items = ArrayList<Any?>()
            if (take(']')) return items
            do items.add(value()) while (take(','))
            need(']')
            return items
        }
        for ((word, meant) in listOf("true" to true, "false" to false, "null" to null)) {
            if (text.startsWith(word, at)) {
                at += word.length
                return meant
            }
        }
        val start = at
        while (at < text.length && text[at] in "+-.eE0123456789") at++
        return text.substring(start, at).toDoubleOrNull() ?: fail()
    }

    companion object {
        fun parse(text: String): Any? = Json(text).value()
    }
}

@Suppress("UNCHECKED_CAST")
fun Any?.fields(): Map<String, Any?> = this as Map<String, Any?>

@Suppress("UNCHECKED_CAST")
fun Any?.items(): List<Any?> = this as List<Any?>

operator fun Any?.get(name: String): Any? = fields()[name]

fun Any?.int(): Int = (this as Double).toInt()

fun Any?.double(): Double = this as Double

fun Any?.string(): String = this as String
