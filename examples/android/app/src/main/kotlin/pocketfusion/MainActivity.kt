package pocketfusion

import android.content.res.AssetManager
import android.graphics.Bitmap
import android.os.Bundle
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.compose.foundation.Image
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.material3.Button
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.remember
import androidx.compose.runtime.rememberCoroutineScope
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.asImageBitmap
import androidx.compose.ui.unit.dp
import java.io.File
import kotlin.random.Random
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** One screen: a prompt, a button, progress, the picture. */
class MainActivity : ComponentActivity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val drawing = lazy { open() } // its first use compiles the UNet: not here, on the main thread
        setContent { MaterialTheme { Screen { prompt, progress -> picture(drawing.value, prompt, progress) } } }
    }

    /** The bundle and unicode.json, which lie in the assets; LiteRT reads files, so they are copied out once. */
    private fun open(): Drawing {
        val folder = File(filesDir, "bundle")
        copy(assets, "bundle", folder)
        val unicode = assets.open("unicode.json").use { it.readBytes().decodeToString() }
        return Drawing(folder, Unicode(Json.parse(unicode)))
    }

    private fun copy(assets: AssetManager, name: String, file: File) {
        val inside = assets.list(name).orEmpty()
        if (inside.isNotEmpty()) {
            file.mkdirs()
            inside.forEach { copy(assets, "$name/$it", File(file, it)) }
        } else if (!file.exists()) {
            val partial = File(file.path + ".partial") // a copy that is cut short is not taken for the file
            assets.open(name).use { from -> partial.outputStream().use { from.copyTo(it) } }
            partial.renameTo(file)
        }
    }

    private fun picture(drawing: Drawing, prompt: String, progress: (Int, Int) -> Unit): Bitmap {
        val pixels = drawing.draw(prompt, Random.nextLong(1L shl 32), progress)
        return Bitmap.createBitmap(pixels, drawing.width, drawing.height, Bitmap.Config.ARGB_8888)
    }
}

@Composable
fun Screen(draw: (String, (Int, Int) -> Unit) -> Bitmap) {
    var prompt by remember { mutableStateOf("a red apple") }
    var done by remember { mutableStateOf<Float?>(null) } // of 1, while it draws
    var bitmap by remember { mutableStateOf<Bitmap?>(null) }
    var failure by remember { mutableStateOf<String?>(null) }
    val scope = rememberCoroutineScope()
    Column(Modifier.padding(16.dp), Arrangement.spacedBy(12.dp)) {
        OutlinedTextField(value = prompt, onValueChange = { prompt = it }, label = { Text("Prompt") })
        Button(
            enabled = done == null,
            onClick = {
                done = 0f
                failure = null
                scope.launch {
                    try {
                        bitmap = withContext(Dispatchers.Default) {
                            draw(prompt) { step, steps -> done = step.toFloat() / steps }
                        }
                    } catch (error: Exception) {
                        failure = error.message ?: error.toString()
                    } finally {
                        done = null
                    }
                }
            },
        ) { Text("Draw") }
        done?.let { LinearProgressIndicator(progress = { it }, modifier = Modifier.fillMaxWidth()) }
        failure?.let { Text(it) }
        bitmap?.let { Image(it.asImageBitmap(), contentDescription = prompt, modifier = Modifier.fillMaxWidth()) }
    }
}
