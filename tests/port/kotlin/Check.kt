// The example's Kotlin against a port kit: CHECK BUNDLE KIT says nothing and ends with 0, or fails.
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.Npy
import java.io.File
import kotlin.math.abs
import pocketfusion.*

fun main(arguments: Array<String>) {
    val (bundle, kit, more) = arguments
    val index = Json.parse(File(kit, "vectors.json").readText())
    val unicode = Unicode(Json.parse(File(kit, "unicode.json").readText()))
    val manifest = Json.parse(File(bundle, "bundle.json").readText())
    tokens(File(bundle, "tokenizer.json"), manifest["tokenizer"], unicode, File(kit, "tokens.json"))
    for (folder in File(more).listFiles().orEmpty().sorted()) {
        tokens(File(folder, "tokenizer.json"), Json.parse(File(folder, "spec.json").readText()), unicode, File(folder, "tokens.json"))
    }
    for ((seed, name) in index["noise"].fields()) {
        val wanted = Npy.read(File(kit, name.string())).bits
        val ours = Noise(seed.toLong()).draw(wanted.size)
        // beyond the ziggurat's edge a C library's float32 log1p may be off by its last bit
        check(ours.indices.all { ours[it].toRawBits() == wanted[it] || abs(ours[it]) > 3.654 }) { "noise of seed $seed" }
    }
    for (table in Json.parse(File(kit, "samplers.json").readText()).items()) {
        val schedule = Schedule(manifest["scheduler"].fields() + ("eta" to table["eta"]), table["sampler"].string(), table["steps"].int())
        fun close(key: String, ours: (Step) -> Double) = table[key].items().forEachIndexed { k, wanted ->
            check(abs(ours(schedule.steps[k]) - wanted.double()) < 1e-9) { "${table["sampler"]} ${table["steps"]} $key $k" }
        }
        close("timesteps") { it.timestep }
        close("noise") { it.noise }
        close("previous_x_0") { it.previous }
        table["ab"].items().forEachIndexed { k, ab ->
            val (a, b) = ab.items().map { it.double() }
            check(abs(schedule.steps[k].a - a) + abs(schedule.steps[k].b - b) < 1e-9) { "${table["sampler"]} step $k" }
        }
        table["timestep_embedding"]?.items()?.forEachIndexed { k, wanted ->
            val ours = timestepEmbedding(schedule.steps[k].timestep, manifest["time_embedding"])
            check(ours.toList() == wanted.items().map { it.double().toFloat() }) { "the embedding of time $k" }
        }
        table["timestep_cond"]?.items()?.let { wanted ->
            val ours = guidanceEmbedding(manifest["defaults"]["guidance_scale"].double(), wanted.size)
            check(ours.toList() == wanted.map { it.double().toFloat() }) { "the embedding of guidance" }
        }
    }
    // a whole picture: the networks are recorded ones, which compare every input bit for bit
    CompiledModel.kit = File(kit)
    val picture = index["picture"]
    var steps = 0
    val drawing = Drawing(File(bundle), unicode)
    val pixels = drawing.draw(picture["prompt"].string(), picture["seed"].double().toLong()) { done, _ -> steps = done }
    drawing.close()
    val rgb = File(kit, "pixels.npy").readBytes().takeLast(3 * pixels.size)
    for ((i, pixel) in pixels.withIndex()) {
        for ((c, shift) in listOf(16, 8, 0).withIndex()) check((pixel shr shift and 255).toByte() == rgb[3 * i + c]) { "pixel $i" }
    }
    check(steps == picture["num_inference_steps"].int())
    check(CompiledModel.opened.map { it.first }.toSet() == setOf("unet", "text_encoder", "decoder"))
    val gpu = manifest["target"] == "litert-gpu"
    for ((name, options) in CompiledModel.opened) {
        check(options.accelerators == setOf(if (gpu) Accelerator.GPU else Accelerator.CPU)) { name }
        val exact = gpu && manifest["networks"][name]["gpu_precision"] == "fp32"
        check((options.gpuOptions?.precision == CompiledModel.GpuOptions.Precision.FP32) == exact) { name }
    }
    println("good")
}

private fun tokens(tokenizer: File, spec: Any?, unicode: Unicode, rows: File) {
    val ours = Tokenizer(Json.parse(tokenizer.readText()), spec, unicode)
    for (row in Json.parse(rows.readText()).items()) {
        val made = ours.encode(row["prompt"].string())
        check(made.ids.toList() == row["ids"].items().map { it.int() } && made.count == row["count"].int()) {
            "$tokenizer: ${row["prompt"]}"
        }
    }
}
