package pocketfusion

import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.Environment
import com.google.ai.edge.litert.TensorBuffer
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.concurrent.Callable
import java.util.concurrent.Executors

/** A network of the bundle, by its name in the manifest. Inputs keep their values from run to run. */
class Network(folder: File, manifest: Any?, name: String, gpu: Boolean, environment: Environment) : AutoCloseable {
    private val spec = manifest["networks"][name]
    private val model: CompiledModel
    private val inputs: Map<String, TensorBuffer>
    private val outputs: Map<String, TensorBuffer>

    init {
        val options = CompiledModel.Options(if (gpu) Accelerator.GPU else Accelerator.CPU)
        if (gpu && spec["gpu_precision"] == "fp32") { // else the GPU's fp16
            options.gpuOptions = CompiledModel.GpuOptions(precision = CompiledModel.GpuOptions.Precision.FP32)
        }
        val file = File(folder, manifest["files"][name]["path"].string())
        model = CompiledModel.create(file.path, options, environment)
        inputs = names("inputs").associateWith { model.createInputBuffer(it) }
        outputs = names("outputs").associateWith { model.createOutputBuffer(it) }
    }

    private fun names(side: String) = spec[side].items().map { it["name"].string() }

    /** The extents of an input; none if the network lacks it. */
    fun shape(input: String): List<Int> =
        spec["inputs"].items().firstOrNull { it["name"] == input }?.let { it["shape"].items().map { n -> n.int() } }.orEmpty()

    fun write(input: String, values: FloatArray) = inputs.getValue(input).writeFloat(values)

    fun write(input: String, values: IntArray) = inputs.getValue(input).writeInt(values)

    fun run(): FloatArray {
        model.run(inputs, outputs)
        return outputs.values.first().readFloat()
    }

    override fun close() {
        (inputs.values + outputs.values).forEach { it.close() }
        model.close()
    }
}

/**
 * Draws with the bundle in `folder`, on the GPU with one of `--target litert-gpu`, else on the CPU.
 *
 * The UNet stays in memory; the text encoder goes before the first step, the decoder arrives during the steps. One
 * picture at a time, off the main thread. The pictures on the CPU are `pocketfusion generate`'s for the same seed.
 */
class Drawing(private val folder: File, unicode: Unicode) : AutoCloseable {
    private val manifest = Json.parse(File(folder, "bundle.json").readText())
    private val gpu = manifest["target"] == "litert-gpu"
    private val environment = Environment.create()
    private val executor = Executors.newSingleThreadExecutor()
    private val tokenizer = Tokenizer(Json.parse(file("tokenizer").readText()), manifest["tokenizer"], unicode)
    private val unet = network("unet")
    val width = manifest["image"]["width"].int()
    val height = manifest["image"]["height"].int()

    private fun file(name: String) = File(folder, manifest["files"][name]["path"].string())

    private fun network(name: String) = Network(folder, manifest, name, gpu, environment)

    /** ARGB pixels, rows from the top; `progress` is given the steps done and their number. */
    fun draw(prompt: String, seed: Long, progress: (Int, Int) -> Unit): IntArray {
        val texts = texts(prompt)
        val decoder = executor.submit(Callable { network("decoder") })
        val latents = denoise(texts, seed, progress)
        return decoder.get().use { pixels(it, latents) }
    }

    /** The text encoder's states: of the empty prompt, where guidance asks for it, and of the prompt. */
    private fun texts(prompt: String): List<FloatArray> = network("text_encoder").use { encoder ->
        fun encode(text: String): FloatArray {
            val tokens = tokenizer.encode(text)
            encoder.write("input_ids", tokens.ids)
            encoder.write("attention_mask", tokens.mask)
            return encoder.run()
        }
        val alone = (manifest["guidance"] ?: "classifier-free") != "classifier-free" // one prediction a step
        val kept = manifest["files"]["empty_prompt_embeds"] != null
        val empty = if (alone) emptyList() else listOf(if (kept) floats(file("empty_prompt_embeds")) else encode(""))
        empty + encode(prompt)
    }

    private fun denoise(texts: List<FloatArray>, seed: Long, progress: (Int, Int) -> Unit): FloatArray {
        val defaults = manifest["defaults"]
        val asked = defaults["guidance_scale"].double()
        val scale = maxOf(asked, 1.0) // up to 1: no guidance
        val count = defaults["num_inference_steps"].int()
        val schedule = Schedule(manifest["scheduler"], (manifest["sampler"] ?: "ddim").string(), count)
        val size = manifest["latents"].let { it["height"].int() * it["width"].int() * it["channels"].int() }
        val batch = unet.shape("encoder_hidden_states")[0]
        val folded = unet.shape("step_coefficients").isNotEmpty()
        // one call a step for both rows of text, or for each where the UNet takes one row
        val calls = if (batch == 2) listOf(texts[0] + texts[1]) else if (scale > 1) texts else texts.takeLast(1)
        unet.write("encoder_hidden_states", calls[0])
        unet.shape("timestep_cond").lastOrNull()?.let { unet.write("timestep_cond", guidanceEmbedding(asked, it)) }

        val noise = Noise(seed)
        var sample = noise.draw(size).also { x -> x.indices.forEach { x[it] *= schedule.initialScale.toFloat() } }
        var previous: FloatArray? = null // x_0 of the step before, for samplers that look at it again
        for ((k, step) in schedule.steps.withIndex()) {
            if (unet.shape("timestep_embedding").isNotEmpty()) {
                val row = timestepEmbedding(step.timestep, manifest["time_embedding"])
                unet.write("timestep_embedding", repeated(row, batch))
            } else {
                unet.write("timestep", FloatArray(batch) { step.timestep.toFloat() })
            }
            val a = step.a.toFloat()
            val b = step.b.toFloat()
            if (folded) {
                unet.write("sample", sample)
                unet.write("step_coefficients", floatArrayOf(scale.toFloat(), a, b))
                sample = unet.run()
            } else {
                unet.write("sample", repeated(sample, batch))
                val rows = calls.map { text ->
                    if (calls.size > 1) unet.write("encoder_hidden_states", text)
                    unet.run()
                }.reduce { one, other -> one + other }
                val output = rows.copyOfRange(rows.size - size, rows.size)
                if (rows.size == 2 * size && scale > 1) {
                    for (i in 0 until size) output[i] = (output[i] - rows[i]) * scale.toFloat() + rows[i]
                }
                val after = FloatArray(size) { a * sample[it] + b * output[it] }
                previous?.let { if (step.previous != 0.0) for (i in 0 until size) after[i] += step.previous.toFloat() * it[i] }
                previous = cleaned(sample, output, step)
                sample = after
            }
            if (step.noise != 0.0) {
                val fresh = noise.draw(size)
                for (i in 0 until size) sample[i] += step.noise.toFloat() * fresh[i]
            }
            progress(k + 1, count)
        }
        return sample
    }

    private fun cleaned(sample: FloatArray, output: FloatArray, step: Step): FloatArray {
        val alpha = step.alpha.toFloat()
        val sigma = step.sigma.toFloat()
        val epsilon = manifest["scheduler"]["prediction_type"] == "epsilon"
        return FloatArray(sample.size) {
            if (epsilon) (sample[it] - sigma * output[it]) / alpha else alpha * sample[it] - sigma * output[it]
        }
    }

    private fun pixels(decoder: Network, latents: FloatArray): IntArray {
        require(decoder.shape("latents").reduce(Int::times) == latents.size) { "the decoder takes tiles: export without --tile" }
        decoder.write("latents", latents)
        val image = decoder.run()
        fun level(x: Float) = Math.rint(((x / 2 + 0.5f).coerceIn(0f, 1f) * 255f).toDouble()).toInt() // halves to even
        return IntArray(width * height) {
            0xff shl 24 or (level(image[3 * it]) shl 16) or (level(image[3 * it + 1]) shl 8) or level(image[3 * it + 2])
        }
    }

    override fun close() {
        executor.shutdown()
        unet.close()
        environment.close()
    }

    private companion object {
        fun repeated(row: FloatArray, times: Int) = FloatArray(row.size * times) { row[it % row.size] }

        fun floats(file: File): FloatArray {
            val bytes = ByteBuffer.wrap(file.readBytes()).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
            return FloatArray(bytes.remaining()).also { bytes.get(it) }
        }
    }
}
